"""The notebooks run, their pairs are in step, and what is stored shows without a network."""

import shutil

import jupytext
import nbformat
import pytest
from notebook_runner import FIGURE, FOLDER, LIVE, PICTURE, executed, kernel, scripts

NAMES = [script.stem for script in scripts()]
MOST_BYTES = 8_000_000


def stored(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
    """Cells that run without a network."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if LIVE not in cell.metadata.get("tags", [])]


def kinds(notebook):
    """Per cell, what its outputs are made of; pictures left out, which take a browser."""
    return [
        [
            sorted(set(o.get("data", {o.get("name", o.output_type): ""})) - {PICTURE})
            for o in c.outputs
        ]
        for c in code(notebook)
    ]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    """A kernel in a folder like the repository's, which the notebooks may write to."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(FOLDER.parent / "figures", root / "figures")
    (root / "notebooks").mkdir()
    with kernel(root / "notebooks") as manager:
        yield manager


def test_all_seven_are_there():
    assert [name[:2] for name in NAMES] == ["01", "02", "03", "04", "05", "06", "07"]


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_in_step(name):
    script, notebook = jupytext.read(FOLDER / f"{name}.py"), stored(name)
    one, two = (
        [(c.cell_type, c.source, c.metadata.get("tags", [])) for c in n.cells]
        for n in (script, notebook)
    )
    assert one == two, f"run: make notebooks (or python tests/notebook_runner.py {name})"


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_whole(name):
    for number, cell in enumerate(code(stored(name)), start=1):
        assert cell.execution_count == number
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text
            data = output.get("data", {})
            assert (FIGURE in data) == (PICTURE in data)
            assert "<script" not in str(data.get("text/html", ""))
            shown = "".join(text for kind, text in data.items() if kind.startswith("text/"))
            assert str(FOLDER.parent) not in shown


def test_stored_outputs_are_small():
    assert sum(path.stat().st_size for path in FOLDER.glob("*.ipynb")) < MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_notebooks_run_and_show_what_is_stored(name, manager):
    again = executed(FOLDER / f"{name}.py", manager)
    assert kinds(again) == kinds(stored(name))
