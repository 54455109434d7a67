"""Tables of the report: cells with a text to read and a value to sort by."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import pandas as pd
from markupsafe import Markup
from pandas.api.types import is_bool_dtype, is_numeric_dtype


@dataclass(frozen=True)
class Cell:
    """What is shown, what it is sorted by, and whether a press on it pins the node it names."""

    text: str
    value: str
    pin: bool = False


@dataclass(frozen=True)
class Column:
    """A heading, and whether what is below it are numbers (set to the right, sorted by size)."""

    name: str
    number: bool


@dataclass(frozen=True)
class Table:
    """What the template draws.

    Attributes:
        caption: names the table and says its units.
        columns: one per cell of a row.
        rows: in the order in which they are shown first.
    """

    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


def make_table(
    frame: pd.DataFrame,
    caption: str,
    formats: Mapping[str, str | Callable[[object], str]],
    pins: Collection[str] = (),
) -> Table:
    """A table of the columns of ``frame`` that ``formats`` names, in that order.

    Args:
        frame: one row per row.
        caption: names the table and says its units.
        formats: of each column: a format specification (``".3f"``, ``""``) or a function. A cell
            that is markup stays as it is, and is sorted by its text.
        pins: nodes that can be pinned where the first column names one.
    """
    columns = [
        Column(name, is_numeric_dtype(frame[name]) and not is_bool_dtype(frame[name]))
        for name in formats
    ]
    rows = [
        [_cell(value, formats[column.name]) for column, value in zip(columns, values, strict=True)]
        for values in frame[list(formats)].itertuples(index=False)
    ]
    for row in rows:
        row[0] = replace(row[0], pin=row[0].text in pins)
    return Table(caption, columns, rows)


def _cell(value: object, form: str | Callable[[object], str]) -> Cell:
    if value is None or value != value:  # NaN: a step that has no such number
        return Cell("–", "")
    if isinstance(value, Markup):
        return Cell(value, str(value.striptags()))
    text = form(value) if callable(form) else format(value, form)
    return Cell(text.replace("-", "−") if not isinstance(value, str) else text, str(value))
