"""Numbers in README and docs, and the cells of studies that they are.

Behind a number stands its key, ``<!-- STUDY; ROW; …; COLUMN -->``: the row of the study's page is
the one that has all these entries. ``COLUMN [2]`` is the second of several values, and
``COLUMN [mean]`` their mean. ``python tools/published.py`` writes every number that has a key again
from the stored table, at the precision that it has.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd

from eigenlens.files import load_table
from eigenlens.paper.studies import EXPERIMENTS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/results.md", "docs/faq.md")
_NUMBER = r"\d[\d,]*(?:\.\d+)?"
_SHOWN = rf"{_NUMBER}(?: (?:/|to) {_NUMBER})*(?: ?%)?(?: \({_NUMBER}% … {_NUMBER}%\))?"
BOUND = re.compile(rf"(?P<shown>{_SHOWN})(?P<mark>\**<!-- (?P<key>[^>]*?) -->)")


@dataclass(frozen=True)
class Bound:
    """A number on a page with its key.

    Attributes:
        shown: as it is printed, with its interval if it has one.
        key: study, entries of the row, column.
        line: of the page, for messages.
    """

    shown: str
    key: tuple[str, ...]
    line: int

    @property
    def cell(self) -> str:
        """What the study has there, printed the same way."""
        return printed_like(self.shown, values(self.key))


def bound(text: str) -> list[Bound]:
    """All numbers of a page that have a key."""
    return [
        Bound(m["shown"], split_key(m["key"]), text.count("\n", 0, m.start()) + 1)
        for m in BOUND.finditer(text)
    ]


def split_key(key: str) -> tuple[str, ...]:
    """The parts of a key."""
    return tuple(part.strip() for part in key.split(";"))


def written(text: str) -> str:
    """The page with every number that has a key as its study has it."""

    def fill(match: re.Match[str]) -> str:
        return printed_like(match["shown"], values(split_key(match["key"]))) + match["mark"]

    return BOUND.sub(fill, text)


@cache
def values(key: tuple[str, ...]) -> tuple[float, ...]:
    """The numbers of a cell.

    Raises:
        ValueError: the key names no cell, or several.
    """
    study, *row, column = key
    name, _, which = column.partition(" [")
    page = summary(study)
    entries = set(row)
    found = [own for own in page.to_dict("records") if entries <= set(map(str, own.values()))]
    if len(found) != 1 or name not in page:
        raise ValueError(f"{'; '.join(key)}: {len(found)} rows of the page have these entries.")
    cell = str(found[0][name])
    if not which:
        return tuple(numbers(cell))
    several = [numbers(part)[0] for part in cell.split(" / ")]
    one = sum(several) / len(several) if which == "mean]" else several[int(which[:-1]) - 1]
    return (one,)


@cache
def summary(study: str) -> pd.DataFrame:
    """What the page of a study shows, from its stored table."""
    table, _ = load_table(ROOT / "figures" / f"{study}.parquet", "experiment")
    return EXPERIMENTS[study].summary(table)


def numbers(text: str) -> list[float]:
    """All numbers in a text."""
    return [float(found.replace(",", "")) for found in re.findall(_NUMBER, text)]


def printed_like(shown: str, cell: Sequence[float]) -> str:
    """The numbers of a cell in the place, and at the precision, of those that are shown.

    Raises:
        ValueError: they are not as many.
    """
    places = re.findall(_NUMBER, shown)
    if len(places) != len(cell):
        raise ValueError(f"{shown!r} has {len(places)} numbers, and its cell {len(cell)}.")
    left = iter(cell)

    def put(match: re.Match[str]) -> str:
        decimals = len(match[0].partition(".")[2])
        return f"{next(left):,.{decimals}f}"

    return re.sub(_NUMBER, put, shown)


def main() -> None:
    """Write every bound number of every page."""
    for name in PAGES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = written(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            sys.stdout.write(f"{name}: written\n")


if __name__ == "__main__":
    main()
