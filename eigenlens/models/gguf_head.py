"""Heads of GGUF files, read so that damage is told.

``gguf`` itself reads nothing beyond the end of a file and goes on, through as many values as the
damaged length of an array promises, and takes a tensor from wherever it is said to lie.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from eigenlens.files import parsing
from eigenlens.models.weight_files import check_file

_MOST = 1 << 22  # values of an array: vocabularies and their merges hold a tenth of that
_SIZES = (
    *("block_count", "embedding_length", "feed_forward_length", "vocab_size", "expert_count"),
    *("attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.value_length", "expert_feed_forward_length"),
)


class _Reader(gguf.GGUFReader):
    """A reader that stops at the end of the file."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, *args: Any, **rest: Any) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data):,} of {end:,}")
        return super()._get(int(offset), dtype, count, *args, **rest)

    def _get_field_parts(self, orig_offs: Any, raw_type: Any) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            length = int(self._get(orig_offs + 4, np.uint64)[0])
            if length > _MOST:
                raise ValueError(f"an array of {length:,} values")
        return super()._get_field_parts(orig_offs, raw_type)


def read_head(file: Path) -> gguf.GGUFReader:
    """Metadata and tensors of a GGUF file; the tensors stay on disk until they are looked at.

    Raises:
        FileFormatError: it is truncated, damaged or no GGUF file.
    """
    check_file(file)
    with parsing(file, "GGUF file"):
        reader = _Reader(file)
        for field in reader.fields.values():
            if gguf.GGUFValueType.STRING in field.types:
                field.contents()  # decodes it
        _check_places(reader)
    return reader


def _check_places(reader: gguf.GGUFReader) -> None:
    """Tensors follow one another, as ggml demands."""
    place = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != place:
            raise ValueError(f"{tensor.name} begins at {tensor.data_offset:,} and not at {place:,}")
        place += tensor.n_bytes + -tensor.n_bytes % reader.alignment


def check_sizes(reader: gguf.GGUFReader) -> None:
    """No size of the model is beyond those of its tensors: it would be made before it is filled.

    Raises:
        ValueError: names the size.
    """
    architecture = reader.fields["general.architecture"].contents()
    names = {tensor.name for tensor in reader.tensors}
    for size in ("block_count", "embedding_length"):  # else transformers takes those of a 7B model
        if f"{architecture}.{size}" not in reader.fields:
            raise ValueError(f"{architecture}.{size} is missing")
    widest = max((int(size) for tensor in reader.tensors for size in tensor.shape), default=0)
    sizes = [*_SIZES, *(["context_length"] if "position_embd.weight" in names else [])]
    for name in (f"{architecture}.{size}" for size in sizes):
        most = len(names) if name.endswith("block_count") else widest
        value = reader.fields[name].contents() if name in reader.fields else 0
        if np.max(value, initial=0) > most:
            raise ValueError(f"{name} is {value}, beyond the sizes of its tensors")
