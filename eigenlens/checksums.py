"""Checksums of result files: damage that can still be read would be a wrong result.

xxh3 tells a damaged file from a whole one; it is no protection against forgery.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

_SIZE = 16  # bytes of a digest
_CHUNK = 1 << 24  # bytes at once
_TAIL = 8  # bytes behind the footer of a parquet file: its length, and "PAR1"


def hash_tensors(
    named: Iterable[tuple[str, Tensor]], text: str = "", *, dtype: torch.dtype | None = None
) -> str:
    """xxh3-128 of a text and of each tensor's name, dtype, shape and bytes, as it is or rounded."""
    digest = xxhash.xxh3_128(text.encode())
    for name, tensor in named:
        kind = dtype or tensor.dtype
        digest.update(f"{name} {kind} {tuple(tensor.shape)}".encode())
        if tensor.numel() and not tensor.is_meta:  # a model on paper has no bytes
            for part in _slices(tensor.detach()):
                flat = part.to("cpu", kind).contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    """Along the first axis, some megabytes each: of what is transposed or elsewhere, a copy."""
    rows = tensor if tensor.ndim else tensor[None]
    return iter(rows.split(max(1, _CHUNK // (rows[0].numel() * rows.element_size()))))


def hash_files(paths: Iterable[Path]) -> str:
    """xxh3-128 of the bytes of files, one after the other."""
    digest = xxhash.xxh3_128()
    for path in paths:
        with path.open("rb") as handle:
            for chunk in iter(lambda: handle.read(_CHUNK), b""):
                digest.update(chunk)
    return digest.hexdigest()


def seal(path: Path) -> None:
    """Put the hash of a parquet file's bytes into it, between its data and its footer.

    No reader looks there, since the footer says where data lie. Parquet's own checksums are those
    of pages: they leave out the footer and the heads of pages.
    """
    digest = xxhash.xxh3_128()
    with path.open("r+b") as file:
        for chunk in _chunks(file, file.seek(0, 2)):
            digest.update(chunk)
        start = _footer(file)
        file.seek(start)
        footer = file.read()
        file.seek(start)
        file.write(digest.digest() + footer)


def is_sealed(file: BinaryIO) -> bool:
    """Whether an open file is what :func:`seal` left."""
    footer = _footer(file)
    start = footer - _SIZE
    if start < 0:
        return False
    digest = xxhash.xxh3_128()
    for chunk in _chunks(file, start):
        digest.update(chunk)
    file.seek(start)
    found = file.read(_SIZE)
    digest.update(file.read())
    return digest.digest() == found


def _chunks(file: BinaryIO, stop: int) -> Iterator[bytes]:
    """The bytes of a file up to a place, some megabytes at once."""
    file.seek(0)
    while stop > 0 and (chunk := file.read(min(_CHUNK, stop))):
        stop -= len(chunk)
        yield chunk


def _footer(file: BinaryIO) -> int:
    """Where the footer begins, by its length at the end of the file."""
    size = file.seek(0, 2)
    file.seek(max(0, size - _TAIL))
    return size - _TAIL - int.from_bytes(file.read(_TAIL)[:4], "little")
