"""Names of temporary files, and which of them processes left behind that were killed.

A name holds the machine and the process that writes it. What belongs to a process that is gone is
deleted by the next one that writes to the same folder. No clock is asked: clocks jump.
"""

import os
import platform
import shutil
import uuid
from pathlib import Path

import psutil
import xxhash

_MACHINE = xxhash.xxh32_hexdigest(platform.node().encode())


def temporary_beside(path: Path) -> Path:
    """A new name in the folder of ``path``, without its suffix: nobody takes it for a result."""
    return path.with_name(f".{_MACHINE}-{os.getpid()}-{uuid.uuid4().hex}")


def sweep(folder: Path) -> None:
    """Delete what processes of this machine that are gone were writing in ``folder``."""
    for path in folder.glob(f".{_MACHINE}-*-*"):
        pid = path.name.split("-")[1]
        if not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
