"""Runs the notebooks: for the tests and, as a script, to store them with fresh outputs.

The scripts ``notebooks/NAME.py`` are what one edits; ``make notebooks`` writes ``NAME.ipynb`` from
them. Figures are stored as plotly data and as PNG, so that they show without a network, on GitHub,
too. Progress bars are not stored. Cells tagged ``live`` need the network and are not run.
"""

import base64
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import jupytext
import nbformat
import plotly.io as pio
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from eigenlens.plots.export import find_browser

FOLDER = Path(__file__).parent.parent / "notebooks"
LIVE = "live"
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
WIDGET = "application/vnd.jupyter.widget-view+json"
_SCALE = 1.5  # of a picture, in pixels of a file to those of the figure


def scripts() -> list[Path]:
    """The paired scripts, in order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


@contextmanager
def kernel(folder: Path) -> Iterator[AsyncKernelManager]:
    """A kernel that runs in ``folder`` and shows plotly's figures as data."""
    manager = AsyncKernelManager(kernel_name="python3")
    environment = {**os.environ, "PLOTLY_RENDERER": "plotly_mimetype"}
    run_sync(manager.start_kernel)(cwd=str(folder), env=environment)
    try:
        yield manager
    finally:
        run_sync(manager.shutdown_kernel)(now=True)


def executed(script: Path, manager: AsyncKernelManager) -> NotebookNode:
    """The notebook of ``script`` with the outputs of a run.

    The kernel may have run other notebooks: it forgets their names first. Importing torch once for
    all of them is most of what a small notebook costs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = jupytext.read(script)
    notebook.cells.insert(0, new_code_cell("%reset -f"))
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=900,
        record_timing=False,
        coalesce_streams=True,
        skip_cells_with_tag=LIVE,
    )
    client.execute()
    client.kc.stop_channels()  # the kernel goes on
    del notebook.cells[0]
    return _tidy(notebook)


def _tidy(notebook: NotebookNode) -> NotebookNode:
    """What belongs into the repository: the same for every run, and no larger than need be."""
    count = 0
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type != "code" or LIVE in cell.metadata.get("tags", []):
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
                _shorten(output.data)
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _shorten(data: NotebookNode) -> None:
    """Of a result object that shows as a table, keep no more than its name as plain text.

    The text would be every field of it, the folder of its model on this machine among them.
    """
    name = re.match(r"\w+\(", data.get("text/plain", ""))
    if name and "text/html" in data:
        data["text/plain"] = f"{name[0]}…)"


def add_pictures(notebooks: list[NotebookNode]) -> None:
    """Put a PNG beside the data of every figure; one start of the browser draws all.

    Raises:
        StaticExportError: kaleido or a Chromium is missing.
    """
    find_browser()
    shown = [
        output.data
        for notebook in notebooks
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if FIGURE in output.get("data", {})
    ]
    figures = [
        pio.from_json(json.dumps({k: data[FIGURE][k] for k in ("data", "layout")}))
        for data in shown
    ]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{number}.png" for number in range(len(figures))]
        pio.write_images(
            figures,
            files,
            format="png",
            scale=_SCALE,
            width=[figure.layout.width for figure in figures],
            height=[figure.layout.height for figure in figures],
        )
        for data, file in zip(shown, files, strict=True):
            data[PICTURE] = base64.b64encode(file.read_bytes()).decode()


if __name__ == "__main__":
    chosen = [s for s in scripts() if s.stem in sys.argv[1:] or not sys.argv[1:]]
    made = []
    with kernel(FOLDER) as manager:
        for script in chosen:
            print(script.stem, flush=True)
            made.append(executed(script, manager))
    add_pictures(made)
    for script, notebook in zip(chosen, made, strict=True):
        nbformat.write(notebook, script.with_suffix(".ipynb"))
