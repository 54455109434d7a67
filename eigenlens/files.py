"""Reading and writing result files: atomic, typed by a header, never pickle.

Every file that eigenlens writes carries a ``kind``, a format version and a checksum, so that a
foreign, truncated or damaged file is refused with a sentence instead of failing somewhere deep
inside, or of giving other numbers.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
from torch import Tensor

from eigenlens.checksums import hash_tensors, is_sealed, seal
from eigenlens.errors import reason
from eigenlens.leftovers import sweep, temporary_beside
from eigenlens.yaml_texts import parse_yaml

_HEADER, _CHECKSUM = "eigenlens", "checksum"
# Format 2 brought checksums; these kinds changed before it as well, or after it.
_FORMATS = dict.fromkeys(("scores", "control", "search state", "evaluation"), "3")
_FORMATS |= dict.fromkeys(("frozen set", "spectra"), "4")  # places in the plain model
_FORMAT = "2"
_ROWS = 1 << 15  # of a table that are written and read at once


class FileFormatError(ValueError):
    """A file is missing parts, truncated, damaged, or not of the kind that was asked for."""


class UnwritableError(OSError):
    """A place cannot be written to: no room, no right, or no such place."""

    def __str__(self) -> str:
        return str(self.strerror)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EIO)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside the block, an error of the disk names ``path`` and says what to do.

    Raises:
        UnwritableError: in place of the system's own error.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        # safetensors tells the number in its text alone.
        found = re.search(r"os error (\d+)", str(error))
        number = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if number not in (*_FULL, *_CLOSED) or isinstance(error, UnwritableError):
            raise
        advice = "make room" if number in _FULL else "choose a place that can be written to"
        raise UnwritableError(
            number,
            f"{path} cannot be written ({os.strerror(number)}): {advice}, and start again. What "
            "was written before is whole.",
        ) from error


@contextmanager
def parsing(path: Path, form: str) -> Iterator[None]:
    """Inside the block, whatever the bytes of a damaged file make a parser raise names the file.

    Raises:
        FileFormatError: in place of the parser's own error.
    """
    try:
        yield
    except Exception as error:  # parsers raise all kinds, a bare Exception among them
        if isinstance(error, FileFormatError) or _of_machine(error):
            raise
        raise FileFormatError(
            f"{path} is truncated or no {form} ({reason(error)}): download, copy or make it again."
        ) from error


def _of_machine(error: Exception) -> bool:
    """Whether an error tells of memory, disk, rights or packages, and nothing of a file."""
    if isinstance(error, OSError) and error.errno is not None:
        return True
    return isinstance(error, MemoryError | ImportError) or type(error) is RuntimeError


def cache_dir() -> Path:
    """Folder for dequantised models and decompositions: ``EIGENLENS_CACHE`` or the user's cache."""
    own = os.environ.get("EIGENLENS_CACHE")
    return Path(os.path.expanduser(own) if own else platformdirs.user_cache_dir("eigenlens"))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file replaces ``path`` only when the block succeeds.

    It lies in a folder of its own beside ``path``: libraries (safetensors is one) put temporary
    files of their own beside what they write, and what a killed process leaves of them goes with
    the folder.

    Raises:
        UnwritableError: no room, or no right to write there; ``path`` is then as it was.
    """
    folder = temporary_beside(path)
    temporary = folder / path.name
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            sweep(path.parent)
            folder.mkdir()
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors writes for the owner alone
            os.replace(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
        FileFormatError: it is no YAML mapping of names to values.
    """
    try:
        values = parse_yaml(Path(path).read_bytes().decode())
    except ValueError as error:
        raise FileFormatError(f"{path} is not valid YAML: {reason(error)}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise FileFormatError(f"{path} does not hold a mapping of options to values.")
    return values


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: it is no JSON object.
    """
    path = _existing(path)
    with parsing(path, "JSON file"):
        values = json.loads(path.read_bytes().decode())
    if not isinstance(values, dict):
        raise FileFormatError(f"{path} holds no JSON object.")
    return values


def _header(kind: str, metadata: Mapping[str, Any]) -> str:
    """A header for :func:`_check_header` alone, in Python's JSON, which has NaN and infinities."""
    return json.dumps({"kind": kind, "format": _FORMATS.get(kind, _FORMAT), **metadata})


def _check_header(path: Path, kind: str, header: str | bytes | None) -> dict[str, Any]:
    metadata = None if header is None else json.loads(header)
    if not isinstance(metadata, dict):
        raise FileFormatError(f"{path} was not written by eigenlens; expected a {kind} file.")
    if metadata.pop("kind", None) != kind:
        raise FileFormatError(
            f"{path} holds another kind of eigenlens result; expected a {kind} file."
        )
    found, known = metadata.pop("format", None), _FORMATS.get(kind, _FORMAT)
    if found != known:
        raise FileFormatError(
            f"{path} is a {kind} file of format {found}; this version of eigenlens reads format "
            f"{known}. Make it again."
        )
    return metadata


def _check_whole(path: Path, whole: bool) -> None:
    if not whole:
        raise FileFormatError(
            f"{path} is damaged: what it holds does not fit its checksum. Copy or make it again."
        )


def save_tensors(
    path: str | os.PathLike[str],
    kind: str,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write named tensors and a JSON header as one safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = _header(kind, metadata or {})
    checksum = hash_tensors(sorted(contiguous.items()), header)
    with atomic_path(Path(path)) as temporary:
        # Under one name: safetensors writes several in an order that changes from run to run.
        whole = {_HEADER: f"{header}\n{checksum}"}
        safetensors.torch.save_file(contiguous, temporary, metadata=whole)


def load_tensors(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read back what :func:`save_tensors` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, damaged, foreign, or of another kind.
    """
    path = _existing(path)
    read = partial(safetensors.safe_open, framework="pt", backend="pread")
    # Not mapped into memory: of a file that is cut short later, a read ends in a bus error.
    with parsing(path, "safetensors file"), read(path) as file:
        header, _, checksum = (file.metadata() or {}).get(_HEADER, "").partition("\n")
        metadata = _check_header(path, kind, header or None)
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        _check_whole(path, hash_tensors(tensors.items(), header) == checksum)
        return tensors, metadata


def save_table(
    path: str | os.PathLike[str],
    kind: str,
    table: pd.DataFrame,
    metadata: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a table and a JSON header as one parquet file, atomically and some rows at a time.

    ``arrays`` are of two dimensions, a row for each row of the table; each is one column of lists.
    """
    arrays = arrays or {}
    shapes = {name: [values.shape[1], str(values.dtype)] for name, values in arrays.items()}
    text = _header(kind, {**(metadata or {}), **({"arrays": shapes} if shapes else {})})
    plain = pa.Schema.from_pandas(table, preserve_index=False)
    schema = plain.with_metadata({**(plain.metadata or {}), _HEADER.encode(): text})
    # parquet has no lists of length 0
    lists = {name: values for name, values in arrays.items() if values.shape[1]}
    for name, values in lists.items():
        schema = schema.append(
            pa.field(name, pa.list_(pa.from_numpy_dtype(values.dtype), values.shape[1]))
        )
    with atomic_path(Path(path)) as temporary:
        with (
            temporary.open("wb") as handle,
            pq.ParquetWriter(handle, schema, compression="zstd") as writer,
        ):
            for start in range(0, max(1, len(table)), _ROWS):
                rows = slice(start, start + _ROWS)
                part = pa.Table.from_pandas(table.iloc[rows], plain, preserve_index=False)
                columns = [*part.columns, *(_as_lists(values[rows]) for values in lists.values())]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        seal(temporary)


def _as_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    """Rows of an array as lists."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def load_table(path: str | os.PathLike[str], kind: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read back what :func:`save_table` wrote, without arrays.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, damaged, foreign, or of another kind.
    """
    table, metadata, _ = load_arrays(path, kind)
    return table, metadata


def load_arrays(
    path: str | os.PathLike[str], kind: str
) -> tuple[pd.DataFrame, dict[str, Any], dict[str, np.ndarray]]:
    """Table, header and arrays that :func:`save_table` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, damaged, foreign, or of another kind.
    """
    path = _existing(path)
    with path.open("rb") as source:
        with parsing(path, "parquet file"):
            file = pq.ParquetFile(source)
            metadata = _check_header(
                path, kind, (file.metadata.metadata or {}).get(_HEADER.encode())
            )
        _check_whole(path, is_sealed(source))
        shapes = metadata.pop("arrays", {})
        plain = [name for name in file.schema_arrow.names if name not in shapes]
        # One column after the other, and each let go once pandas has it.
        columns = file.read(columns=plain, use_threads=False)
        table = columns.to_pandas(split_blocks=True, self_destruct=True)
        del columns
        arrays = {
            name: _of_lists(file, name, width, dtype) for name, (width, dtype) in shapes.items()
        }
    return table, metadata, arrays


def _of_lists(file: pq.ParquetFile, name: str, width: int, dtype: str) -> np.ndarray:
    """A column of lists as an array, some rows at a time."""
    values = np.zeros((file.metadata.num_rows, width), dtype)
    start = 0
    for group in range(file.num_row_groups if width else 0):
        column = file.read_row_group(group, columns=[name])[name].combine_chunks()
        values[start : start + len(column)] = column.flatten().to_numpy().reshape(-1, width)
        start += len(column)
    return values


def save_record(path: str | os.PathLike[str], kind: str, record: Mapping[str, Any]) -> None:
    """Write a JSON object with a header, atomically; tables in it are lists by column."""
    plain = json.loads(json.dumps(_nulls(record)))
    header = {**json.loads(_header(kind, {})), _CHECKSUM: _hash_json(plain)}
    write_json(path, {_HEADER: header, **plain})


def _hash_json(value: Any) -> str:
    return hash_tensors([], json.dumps(value))


def load_record(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read back what :func:`save_record` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, damaged, foreign, or of another kind.
    """
    path = _existing(path)
    record = read_json(path)
    header = _check_header(path, kind, json.dumps(record.pop(_HEADER, None)))
    _check_whole(path, header.get(_CHECKSUM) == _hash_json(record))
    found: dict[str, Any] = _missing_numbers(record)
    return found
