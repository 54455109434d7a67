"""Checksums of result files: damage that can still be read would be a wrong result.

xxh3 tells a damaged file from a whole one; it is no protection against forgery.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
import xxhash
from torch import Tensor

_SIZE = 16  # bytes of a digest
_TAIL = 8  # bytes behind the footer of a parquet file: its length, and "PAR1"


def hash_tensors(named: Iterable[tuple[str, Tensor]], text: str = "") -> str:
    """xxh3-128 of a text and of each tensor's name, dtype, shape and bytes."""
    digest = xxhash.xxh3_128(text.encode())
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel() and not tensor.is_meta:  # a model on paper has no bytes
            flat = tensor.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_files(paths: Iterable[Path]) -> str:
    """xxh3-128 of the bytes of files, one after the other."""
    digest = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as handle:
            for chunk in iter(lambda: handle.read(1 << 24), b""):
                digest.update(chunk)
    return digest.hexdigest()


def sealed(parquet: bytes) -> bytes:
    """A parquet file with the hash of all its other bytes between its data and its footer.

    No reader looks there, since the footer says where data lie. Parquet's own checksums are those
    of pages: they leave out the footer and the heads of pages.
    """
    footer = _footer(parquet)
    return parquet[:footer] + xxhash.xxh3_128_digest(parquet) + parquet[footer:]


def is_whole(parquet: bytes) -> bool:
    """Whether the bytes are those that :func:`sealed` gave."""
    footer = _footer(parquet)
    start = footer - _SIZE
    if start < 0:
        return False
    digest = xxhash.xxh3_128(parquet[:start])
    digest.update(parquet[footer:])
    return digest.digest() == parquet[start:footer]


def _footer(parquet: bytes) -> int:
    """Where the footer begins, by its length at the end of the file."""
    return len(parquet) - _TAIL - int.from_bytes(parquet[-_TAIL:][:4], "little")
