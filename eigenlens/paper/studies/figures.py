"""Every figure and page again, from the stored tables alone, and the index of them."""

from collections.abc import Iterable
from pathlib import Path

from eigenlens.files import load_table, write_text
from eigenlens.paper.studies import EXPERIMENTS
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.paper.studies.study import shown
from eigenlens.plots.export import FORMATS, export


def stored(name: str, folder: Path) -> ExperimentResult:
    """What a study measured, read from ``NAME.parquet`` and shown anew.

    Raises:
        ValueError: no such study.
        FileNotFoundError: its table is not in the folder.
        FileFormatError: the file is truncated or foreign.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"Unknown study {name!r}; choose from {', '.join(EXPERIMENTS)}.")
    file = folder / f"{name}.parquet"
    if not file.is_file():
        raise FileNotFoundError(
            f"No such file: {file}. `eigenlens experiment {name} --out {folder}` measures it "
            f"(about {EXPERIMENTS[name].MINUTES} minutes)."
        )
    table, metadata = load_table(file, "experiment")
    return shown(EXPERIMENTS[name], name, table, metadata["settings"])


def redraw(
    folder: Path, names: Iterable[str] = (), formats: Iterable[str] = FORMATS
) -> list[ExperimentResult]:
    """Write figures, pages and the index again.

    Args:
        folder: holds ``NAME.parquet`` of each study.
        names: of the studies (default: all whose tables are there).
        formats: of :data:`eigenlens.plots.export.FORMATS`.

    Raises:
        ValueError: an unknown study or format.
        FileNotFoundError: a table, or any table at all, is missing.
        StaticExportError: kaleido or a Chromium is missing; HTML has been written before.
    """
    found = [stored(name, folder) for name in names or _present(folder)]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no table of a study. `eigenlens experiment NAME --out {folder}` "
            f"measures one; NAME is {', '.join(EXPERIMENTS)}."
        )
    export({result.name: result.figure for result in found}, folder, formats)
    for result in found:
        result.save_page(folder)
    write_index(folder)
    return found


def write_index(folder: Path) -> None:
    """Write ``README.md``: each figure, what it asks, and the commands that make it."""
    write_text(folder / "README.md", _HEAD + "".join(map(_entry, _present(folder))))


def _present(folder: Path) -> list[str]:
    return [name for name in EXPERIMENTS if (folder / f"{name}.parquet").is_file()]


_HEAD = """# Figures and tables

Each page holds the summary, the figure and the commands; every measurement is in the parquet file
of the same name, and the figure is drawn from it alone. `eigenlens figures` draws all of them: SVG
and PDF (a page of 7 in or a column of 3.3 in wide), PNG, and HTML beside one `plotly.min.js`, which
opens without a network. PNG and HTML are not kept in version control.

A study that was interrupted goes on from its finished parts in `runs/experiments`.

SVG, PDF and PNG take `pip install 'eigenlens[figures]'` and a Chromium (`apt-get install chromium`,
or `plotly_get_chrome`).
"""


def _entry(name: str) -> str:
    study = EXPERIMENTS[name]
    return f"""
## [{name}]({name}.md)

{study.QUESTION}

[![{name}]({name}.svg)]({name}.md)

| | command | time on 2 cores |
|---|---|---|
| measure | `eigenlens experiment {name} --out figures` | {study.MINUTES} minutes |
| draw | `eigenlens figures {name} --out figures` | seconds |
"""
