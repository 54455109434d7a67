"""Reading and writing result files: atomic, typed by a header, never pickle.

Every file that eigenlens writes carries a ``kind`` and a format version in its metadata, so that a
foreign or truncated file is refused with a sentence instead of failing somewhere deep inside.
"""

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
import yaml
from torch import Tensor

_HEADER = "eigenlens"
# Kinds whose files changed; all others are as they were first written.
_FORMATS = {"scores": "2", "frozen set": "2", "control": "2", "spectra": "2", "search state": "2"}


class FileFormatError(ValueError):
    """A file is missing parts, truncated, or not of the kind that was asked for."""


def cache_dir() -> Path:
    """Folder for dequantised models and decompositions: ``EIGENLENS_CACHE`` or the user's cache."""
    own = os.environ.get("EIGENLENS_CACHE")
    return Path(os.path.expanduser(own) if own else platformdirs.user_cache_dir("eigenlens"))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that replaces it only when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as :func:`json_text`, atomically."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """``value`` as indented JSON; NaN and infinity, which JSON lacks, as null."""
    return json.dumps(_nulls(value), indent=2, ensure_ascii=False, allow_nan=False)


def _nulls(value: Any) -> Any:
    """``value`` with ``None`` for each number that is not finite."""
    if isinstance(value, Mapping):
        return {key: _nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _missing_numbers(value: Any) -> Any:
    """``value`` with NaN for each null in a list: the lists of a record are columns of tables."""
    if isinstance(value, dict):
        return {key: _missing_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [math.nan if item is None else _missing_numbers(item) for item in value]
    return value


def _existing(path: str | os.PathLike[str]) -> Path:
    found = Path(path)
    if not found.is_file():
        raise FileNotFoundError(f"No such file: {found}")
    return found


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Options and values of a YAML file.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is no YAML mapping.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise FileFormatError(f"{path} does not hold a mapping of options to values.")
    return values


def _header(kind: str, metadata: Mapping[str, Any]) -> str:
    """A header for :func:`_check_header` alone, in Python's JSON, which has NaN and infinities."""
    return json.dumps({"kind": kind, "format": _FORMATS.get(kind, "1"), **metadata})


def _check_header(path: Path, kind: str, header: str | None) -> dict[str, Any]:
    if header is None:
        raise FileFormatError(f"{path} was not written by eigenlens; expected a {kind} file.")
    metadata = json.loads(header)
    if metadata.pop("kind", None) != kind:
        raise FileFormatError(
            f"{path} holds another kind of eigenlens result; expected a {kind} file."
        )
    found, known = metadata.pop("format", None), _FORMATS.get(kind, "1")
    if found != known:
        raise FileFormatError(
            f"{path} is a {kind} file of format {found}; this version of eigenlens reads format "
            f"{known}. Make it again."
        )
    return metadata


def save_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write named tensors and a JSON header as one safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(Path(path)) as temporary:
        safetensors.torch.save_file(
            contiguous, temporary, metadata={_HEADER: _header(kind, metadata or {})}
        )


def load_tensors(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what :func:`save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, foreign, or of another kind.
    """
    path = _existing(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER)
            metadata = _check_header(path, kind, header)
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise FileFormatError(
            f"{path} is truncated or not a safetensors file ({error})."
        ) from error


def save_table(
    path: str | os.PathLike[str],
    kind: str,
    table: pd.DataFrame,
    metadata: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a table and a JSON header as one parquet file, atomically.

    ``arrays`` are of two dimensions, a row for each row of the table; each is one column of lists.
    """
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    arrays = arrays or {}
    for name, values in arrays.items():
        if values.shape[1]:  # parquet has no lists of length 0
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
            arrow = arrow.append_column(name, lists)
    shapes = {name: [values.shape[1], str(values.dtype)] for name, values in arrays.items()}
    text = _header(kind, {**(metadata or {}), **({"arrays": shapes} if shapes else {})})
    header = {**(arrow.schema.metadata or {}), _HEADER.encode(): text}
    with atomic_path(Path(path)) as temporary:
        pq.write_table(arrow.replace_schema_metadata(header), temporary, compression="zstd")


def load_table(path: str | os.PathLike[str], kind: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read back what :func:`save_table` wrote, without arrays.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, foreign, or of another kind.
    """
    table, metadata, _ = load_arrays(path, kind)
    return table, metadata


def load_arrays(
    path: str | os.PathLike[str], kind: str
) -> tuple[pd.DataFrame, dict[str, Any], dict[str, np.ndarray]]:
    """Table, header and arrays that :func:`save_table` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, foreign, or of another kind.
    """
    path = _existing(path)
    try:
        arrow = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise FileFormatError(f"{path} is truncated or not a parquet file ({error}).") from error
    header = (arrow.schema.metadata or {}).get(_HEADER.encode())
    metadata = _check_header(path, kind, header.decode() if header else None)
    arrays: dict[str, np.ndarray] = {}
    for name, (width, dtype) in metadata.pop("arrays", {}).items():
        values = np.zeros((len(arrow), width), dtype)
        if width:
            column = arrow[name].combine_chunks()
            values = column.flatten().to_numpy().reshape(len(arrow), width)
            arrow = arrow.drop_columns([name])
        arrays[name] = values
    return arrow.to_pandas(), metadata, arrays


def save_record(path: str | os.PathLike[str], kind: str, record: Mapping[str, Any]) -> None:
    """Write a JSON object with a header, atomically; tables in it are lists by column."""
    write_json(path, {_HEADER: json.loads(_header(kind, {})), **record})


def load_record(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read back what :func:`save_record` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, foreign, or of another kind.
    """
    path = _existing(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is truncated or not a JSON file ({error}).") from error
    header = record.pop(_HEADER, None) if isinstance(record, dict) else None
    _check_header(path, kind, json.dumps(header) if header else None)
    found: dict[str, Any] = _missing_numbers(record)
    return found
