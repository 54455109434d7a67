"""The cache on disk of decompositions and dequantised models (``eigenlens cache``).

Decompositions are named by a hash of the weight they are of. Together they take at most
:data:`LIMIT_GB`; beyond that, those that were not used for the longest time go first.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eigenlens.files import (
    FileFormatError,
    UnwritableError,
    cache_dir,
    load_tensors,
    save_tensors,
)

LIMIT_GB = 20.0
_DECOMPOSITIONS, _MODELS = "bases", "models"
_NOT_KEPT = (
    "Decompositions cannot be kept in {} ({}) and are made each time: make room there, or name "
    "another folder in EIGENLENS_CACHE."
)


@dataclass(frozen=True)
class Entry:
    """One thing that is kept: its ``kind``, where it lies, its size, and when it was used last."""

    kind: str
    path: Path
    size: int
    used: float


def entries() -> list[Entry]:
    """What the cache holds, last used first."""
    found = _decompositions()
    for folder in (cache_dir() / _MODELS).glob("*"):
        with suppress(FileNotFoundError):  # deleted by another process in between
            files = [path.stat() for path in folder.rglob("*") if path.is_file()]
            size = sum(file.st_size for file in files)
            if folder.is_dir():
                found.append(Entry("model", folder, size, folder.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def _decompositions() -> list[Entry]:
    """Decompositions, last used first."""
    found = []
    for path in (cache_dir() / _DECOMPOSITIONS).glob("*/*.safetensors"):
        with suppress(FileNotFoundError):  # deleted by another process in between
            s = path.stat()
            found.append(Entry("decomposition", path, s.st_size, s.st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def clear() -> int:
    """Delete everything; returns the bytes freed."""
    freed = 0
    for entry in entries():
        freed += entry.size
        _delete(entry)
    return freed


def kept(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors under a key, made when they are first asked for; a damaged file is made anew.

    A cache that cannot be written to is told once, and done without.
    """
    path = cache_dir() / _DECOMPOSITIONS / key[:2] / f"{key}.safetensors"
    with suppress(FileNotFoundError, FileFormatError):
        tensors, _ = load_tensors(path, "decomposition")
        with suppress(OSError):  # a read-only cache serves as well
            os.utime(path)
        return tensors
    tensors = make()
    try:
        save_tensors(path, "decomposition", tensors)
    except UnwritableError as error:
        warnings.warn(_NOT_KEPT.format(cache_dir(), os.strerror(error.errno or 0)), stacklevel=2)
    return tensors


def trim(limit_gb: float | None = None) -> None:
    """Delete the decompositions that were not used for the longest time, down to the limit."""
    left = (LIMIT_GB if limit_gb is None else limit_gb) * 1e9
    for entry in _decompositions():
        left -= entry.size
        if left < 0:
            _delete(entry)


def _delete(entry: Entry) -> None:
    if entry.path.is_dir():
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        with suppress(OSError):  # of another process, or in a read-only cache
            entry.path.unlink(missing_ok=True)
