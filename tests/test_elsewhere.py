"""Cells of studies as tasks: what comes back is what one process makes."""

import pickle
import threading
import time

import pandas as pd
import psutil
import pytest
from test_grid import CONFIG
from typer.testing import CliRunner

from eigenlens.baselines import Laser
from eigenlens.baselines.baseline import Baseline
from eigenlens.cli import app
from eigenlens.distributed import Cluster, FailedTaskError
from eigenlens.paper.studies import elsewhere
from eigenlens.paper.studies.config import StudyConfig
from eigenlens.paper.studies.elsewhere import make_cells, only
from eigenlens.paper.studies.grid import cells, run_grid

# One process may need other seconds and bytes than another.
SAME = ["model", "label", "seed", "method", "draw", "cell", "data", "right", "loss", "components"]
SAME += ["correct", "forward_examples", "backward_examples", "candidates", "chosen"]
METHODS = {k: CONFIG["methods"][k] for k in ("before", "ranked", "random", "LASER")}
STUDY = StudyConfig(**CONFIG | {"seeds": [0], "methods": METHODS})


class InTurn(Cluster):
    """Tasks and what they return cross the border of a process; nothing is started."""

    def __init__(self):
        self.keys = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def results(self, tasks, *, keep_going=False, **shown):
        failed = []
        for number, task in enumerate(tasks):
            self.keys.append(task.key)
            sent = pickle.loads(pickle.dumps(task))
            try:
                made = sent.function(*sent.arguments)
            except RuntimeError as error:
                failed.append(FailedTaskError(f"{task.key} failed: {error}"))
                continue
            yield number, pickle.loads(pickle.dumps(made))
        if failed:
            raise failed[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_grid(STUDY, tmp_path_factory.mktemp("alone"))


def nothing_is_fitted(*args, **kwargs):
    raise AssertionError("a cell was made here")


@pytest.mark.slow
def test_cells_come_back_as_one_process_makes_them(alone, tmp_path, monkeypatch):
    cluster = InTurn()
    make_cells(STUDY, tmp_path, cluster)
    assert len(cluster.keys) == len(METHODS)  # the two draws of one are a task
    assert all(key.startswith("product, ") for key in cluster.keys)
    monkeypatch.setattr(Baseline, "fit", nothing_is_fitted)
    pd.testing.assert_frame_equal(run_grid(STUDY, tmp_path)[SAME], alone[SAME])
    again = InTurn()
    make_cells(STUDY, tmp_path, again)
    assert again.keys == []


def test_a_cell_alone_is_the_cell_of_the_study():
    for cell in cells(STUDY):
        own = list(cells(only(STUDY, cell)))
        assert cell.key in {c.key for c in own}
        assert {c.name for c in own} <= {cell.name, "ranked"}


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_others_are_kept(tmp_path, monkeypatch):
    def fails(self, search):
        raise RuntimeError("no such rank")

    monkeypatch.setattr(Laser, "find", fails)
    cluster = InTurn()
    with pytest.raises(FailedTaskError, match=r"^product, LASER, seed 0 .* no such rank"):
        make_cells(STUDY, tmp_path, cluster)
    monkeypatch.undo()
    again = InTurn()
    make_cells(STUDY, tmp_path, again)
    done = {key.split(", ")[1] for key in cluster.keys} - {"LASER"}
    assert not done & {key.split(", ")[1] for key in again.keys}


@pytest.mark.slow
def test_a_cell_that_is_another_one_over_there(tmp_path, monkeypatch):
    monkeypatch.setattr(elsewhere, "_new", lambda folder, given: {})
    with pytest.raises(ValueError, match=r"product, before, .* came back as another cell"):
        make_cells(STUDY, tmp_path, InTurn())


def test_a_study_of_one_piece(monkeypatch):
    monkeypatch.setattr("eigenlens.distributed.Cluster", lambda address: InTurn())
    found = CliRunner().invoke(app, ["experiment", "suppressed", "--ray"])
    assert found.exit_code == 2
    assert "'suppressed' is of one piece: drop --ray" in found.output


@pytest.mark.slow
def test_on_real_processes_one_of_which_is_killed(alone, tmp_path, monkeypatch):
    killed = []

    def kill_one():
        """The first that makes a cell of LASER, told by the name that Ray gives the process."""
        end = time.monotonic() + 300
        while not killed and time.monotonic() < end:
            for process in psutil.Process().children(recursive=True):
                try:
                    if "LASER" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.Error:
                    continue
            time.sleep(0.05)

    with Cluster(workers=2, memory_mb=100) as cluster:
        thread = threading.Thread(target=kill_one)
        thread.start()
        make_cells(STUDY, tmp_path, cluster)
        thread.join()
    assert killed
    monkeypatch.setattr(Baseline, "fit", nothing_is_fitted)
    pd.testing.assert_frame_equal(run_grid(STUDY, tmp_path)[SAME], alone[SAME])
