"""The cache on disk of decompositions and dequantised models (``eigenlens cache``).

Decompositions are named by a hash of the weight they are of. Together they take at most
:data:`LIMIT_GB`; beyond that, those that were not used for the longest time go first.
"""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eigenlens.files import FileFormatError, cache_dir, load_tensors, save_tensors

LIMIT_GB = 20.0
_DECOMPOSITIONS, _MODELS = "bases", "models"


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
        if folder.is_dir():
            files = [path.stat() for path in folder.rglob("*") if path.is_file()]
            size = sum(file.st_size for file in files)
            found.append(Entry("model", folder, size, folder.stat().st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def _decompositions() -> list[Entry]:
    """Decompositions, last used first."""
    files = (cache_dir() / _DECOMPOSITIONS).glob("*/*.safetensors")
    found = [(path, path.stat()) for path in files]
    kept = [Entry("decomposition", path, s.st_size, s.st_mtime) for path, s in found]
    return sorted(kept, key=lambda entry: -entry.used)


def clear() -> int:
    """Delete everything; returns the bytes freed."""
    freed = 0
    for entry in entries():
        freed += entry.size
        _delete(entry)
    return freed


def kept(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors under a key, made when they are first asked for; a damaged file is made anew."""
    path = cache_dir() / _DECOMPOSITIONS / key[:2] / f"{key}.safetensors"
    with suppress(FileNotFoundError, FileFormatError):
        tensors, _ = load_tensors(path, "decomposition")
        with suppress(OSError):  # a read-only cache serves as well
            os.utime(path)
        return tensors
    tensors = make()
    save_tensors(path, "decomposition", tensors)
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
        entry.path.unlink(missing_ok=True)
