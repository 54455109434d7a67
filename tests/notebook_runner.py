"""Runs the notebooks: for the tests and, as a script, to store them with fresh outputs.

The scripts ``notebooks/NAME.py`` are what one edits; ``make notebooks`` writes ``NAME.ipynb`` from
them. Figures are stored as plotly data and as PNG, so that they show without a network, on GitHub,
too. Progress bars are not stored. Cells tagged ``live`` need the network and are not run.
"""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent.parent / "notebooks"
LIVE = "live"
WIDGET = "application/vnd.jupyter.widget-view+json"


def scripts() -> list[Path]:
    """The paired scripts, in order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def executed(script: Path, folder: Path, renderer: str) -> NotebookNode:
    """The notebook of ``script`` with the outputs of a run.

    Args:
        script: in jupytext's percent format.
        folder: where the kernel runs.
        renderer: of plotly, for figures that a cell shows.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = jupytext.read(script)
    client = NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        skip_cells_with_tag=LIVE,
        store_widget_state=False,
    )
    client.execute(env={**os.environ, "PLOTLY_RENDERER": renderer})
    return _tidy(notebook)


def _tidy(notebook: NotebookNode) -> NotebookNode:
    """What belongs into the repository: the same for every run, and no larger than need be."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


if __name__ == "__main__":
    chosen = sys.argv[1:] or [script.stem for script in scripts()]
    for script in scripts():
        if script.stem in chosen:
            print(script.stem, flush=True)
            notebook = executed(script, FOLDER, "plotly_mimetype+png")
            nbformat.write(notebook, script.with_suffix(".ipynb"))
