"""Numbers on the pages are those of the cells that their keys name, row by row."""

import re
from itertools import combinations

import published
import pytest

from eigenlens.files import load_table

TEXTS = {name: (published.ROOT / name).read_text(encoding="utf-8") for name in published.PAGES}
INTERVAL = re.compile(r"\d[\d.]*% \(\d[\d.]*% … \d[\d.]*%\)")


def wrong(text):
    """Numbers that are not their cells'."""
    return [b for b in published.bound(text) if not matches(b)]


def matches(found):
    try:
        return found.cell == found.shown
    except ValueError:  # as many numbers as the cell has
        return False


def tables(text):
    """Rows of the tables of a page, cell by cell, each table under its header."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        yield [line.strip("|\n").split("|") for line in block.splitlines() if "---" not in line]


def named(label, part):
    """Whether a label of a table names an entry of a key, in more words or in fewer."""
    one, other = (set(re.findall(r"[\w+?]+", text.lower())) for text in (label, part))
    return bool(one) and (one <= other or other <= one)


def misplaced(text):
    """Keys whose row or column in the table is another's.

    What differs between the keys of a column must be named by the row, and what differs between
    those of a row by the column's header.
    """
    found = []
    for header, *rows in tables(text):
        keys = {
            (i, j): bound[0].key
            for i, row in enumerate(rows)
            for j, cell in enumerate(row)
            if (bound := published.bound(cell))
        }
        for (i, j), key in keys.items():
            for part in key[1:-1]:
                along = [k for (a, b), k in keys.items() if b == j and a != i]
                across = [  # of the same measure
                    k for (a, b), k in keys.items() if a == i and b != j and k[-1] == key[-1]
                ]
                by_row = any(part not in k for k in along)
                by_column = any(part not in k for k in across)
                if by_row and not by_column and not named(rows[i][0], part):
                    found.append((key, rows[i][0]))
                if by_column and not by_row and not named(header[j], part):
                    found.append((key, header[j]))
    return found


@pytest.mark.parametrize("name", published.PAGES)
def test_every_number_is_its_cells(name):
    assert len(published.bound(TEXTS[name])) > 10
    assert [(b.line, b.shown, b.cell) for b in wrong(TEXTS[name])] == []
    assert misplaced(TEXTS[name]) == []


@pytest.mark.parametrize("name", published.PAGES)
def test_every_accuracy_with_an_interval_has_a_key(name):
    keyed = len([b for b in published.bound(TEXTS[name]) if "(" in b.shown])
    assert len(INTERVAL.findall(TEXTS[name])) == keyed


@pytest.mark.parametrize("name", published.PAGES)
def test_two_numbers_or_two_keys_swapped_are_found(name):
    found = list(published.BOUND.finditer(TEXTS[name]))
    for one, other in combinations(found, 2):
        if one["shown"] != other["shown"] and one["key"] != other["key"]:
            pairs = [(other["shown"], one["key"]), (one["shown"], other["key"])]
            swapped = "".join(f"{shown}<!-- {key} -->" for shown, key in pairs)
            assert wrong(swapped), (one[0], other[0])


@pytest.mark.parametrize("name", ["README.md", "docs/results.md"])
def test_two_rows_whose_values_are_swapped_with_their_keys_are_found(name):
    swapped = 0
    for header, *rows in tables(TEXTS[name]):
        keyed = [row for row in rows if published.bound("|".join(row))]
        for one, other in combinations(keyed, 2):
            mixed = [
                [other[0], *one[1:]]
                if row is other
                else [one[0], *other[1:]]
                if row is one
                else row
                for row in rows
            ]
            page = "\n".join("|" + "|".join(cells) + "|" for cells in [header, *mixed]) + "\n"
            assert misplaced(page), (one[0], other[0])
            swapped += 1
    assert swapped > 10


def test_a_number_is_written_as_it_was_printed():
    assert published.printed_like("2,408", [2408.13]) == "2,408"
    assert (
        published.printed_like("82.0% (1.0% … 2.0%)", [79.96, 60, 91.2]) == "80.0% (60.0% … 91.2%)"
    )
    assert published.printed_like("2.2 %", [2.183]) == "2.2 %"
    with pytest.raises(ValueError, match="has 1 numbers"):
        published.printed_like("82.0%", [1.0, 2.0])


def test_a_key_that_names_no_cell_is_refused():
    key = "compare; a + b, 10 … 29; LoRA; test accuracy"
    cells, _ = load_table(published.ROOT / "figures" / "compare.parquet", "experiment")
    cells = cells[(cells["label"] == "a + b, 10 … 29") & (cells["method"] == "LoRA")]
    measured = 100 * cells["right"].sum() / cells["n"].sum()
    assert published.values(published.split_key(key))[0] == round(measured, 1)
    for wrong_key in (key.replace("LoRA", "LoRa"), "compare; LoRA; test accuracy", key + "!"):
        with pytest.raises(ValueError, match="rows of the page have these entries"):
            published.values(published.split_key(wrong_key))
