"""Rows of JSONL files that know where they stand, so that every complaint names file and line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eigenlens.errors import reason, short


class DataError(ValueError):
    """A data file or one of its rows is malformed; the message names file and line."""


@dataclass(frozen=True)
class Row:
    """One JSON object of a data file.

    Attributes:
        fields: its keys and values.
        where: file and line, for messages.
    """

    fields: Mapping[str, Any]
    where: str

    def error(self, problem: str) -> DataError:
        """The error to raise for this row."""
        return DataError(f"{self.where}: {short(problem)}.")

    def get(self, name: str) -> Any:
        """Value of a field.

        Raises:
            DataError: there is no such field.
        """
        if name not in self.fields:
            there = ", ".join(map(repr, self.fields)) or "no fields"
            raise self.error(f"the field {name!r} is missing (the row has {there})")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Value of a field that must be a string with something in it.

        Raises:
            DataError: it is missing, not a string, or empty.
        """
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"the field {name!r} must be a text, not {value!r}")
        return value


def read_rows(path: Path) -> list[Row]:
    """All rows of a JSONL file (one JSON object a line, UTF-8); blank lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: a folder; a line that is not UTF-8, not JSON or not an object, that has a key
            twice in an object or half a surrogate pair in a text; or a file without rows.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name a file in it.")
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}")
    rows = list(_parsed(path))
    if not rows:
        raise DataError(f"{path} is empty: expected one JSON object on each line.")
    return rows


def _parsed(path: Path) -> Iterator[Row]:
    # Bytes, because str.splitlines also breaks at signs that may stand inside a JSON string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        where = f"{path}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 ({error.reason}).") from error
        if text.strip():
            yield Row(_fields(text, where), where)


def _fields(text: str, where: str) -> dict[str, Any]:
    """The JSON object in a line."""
    try:
        fields = json.loads(text, object_pairs_hook=_without_duplicates)
        json.dumps(fields, ensure_ascii=False).encode()  # refuses half a surrogate pair
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}).") from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{where}: {half} is half of a surrogate pair and no character: write the pair, or the "
            "character itself."
        ) from error
    except (ValueError, RecursionError) as error:  # also of numbers and nestings without end
        raise DataError(f"{where}: cannot be read: {reason(error)}.") from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: expected a JSON object, not {text.strip()[:40]!r}.")
    return fields


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} comes twice in one object")
    return fields
