"""Two processes at one place: a run folder refuses the second by name, a shared part lets it wait.

The system itself gives a lock back when its holder ends, killed or not. The file of a lock says who
holds it, and goes with it.
"""

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from eigenlens.files import writing

_NAME = ".lock"


class BusyError(ValueError):
    """Another process works at this place."""


@contextmanager
def alone(folder: Path | None) -> Iterator[None]:
    """Hold a folder, which is made if it is not there; nothing is held for ``None``.

    Raises:
        BusyError: another process holds it; names the process.
        UnwritableError: the folder cannot be made or written to.
    """
    if folder is None:
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = _taken(folder / _NAME, wait=False)
    if lock is None:
        raise BusyError(
            f"{folder} is in use by {_holder(folder / _NAME)}: wait until that has ended, or "
            "choose another folder."
        )
    with _released(lock):
        yield


@contextmanager
def in_turn(path: Path) -> Iterator[None]:
    """Hold what is made at ``path``; where another process does, wait for it and say so.

    Raises:
        UnwritableError: the folder of ``path`` cannot be made or written to.
    """
    file = path.with_name(f".{path.name}{_NAME}")
    with writing(path):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = _taken(file, wait=False)
        if lock is None:
            warnings.warn(f"{path} is being made by {_holder(file)}: waiting for it.", stacklevel=3)
            lock = _taken(file, wait=True)
    assert lock is not None
    with _released(lock):
        yield


def _taken(file: Path, *, wait: bool) -> FileLock | None:
    """The lock, or ``None`` where another process holds it."""
    lock = FileLock(file, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        return None
    with suppress(OSError):  # only for messages
        file.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    return lock


def _holder(file: Path) -> str:
    with suppress(OSError, ValueError):
        if text := file.read_text(encoding="utf-8").strip():
            return text
    return "another process"


@contextmanager
def _released(lock: FileLock) -> Iterator[None]:
    """Give the lock back at the end, and delete its file while it is still held.

    Who waits for a deleted file is sent to the new one by filelock.
    """
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()
