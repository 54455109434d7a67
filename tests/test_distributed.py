"""Work on real processes of Ray: the same results as one process, whatever is lost on the way."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from tiny_models import EQUAL, MIXED, in_families
from typer.testing import CliRunner

import eigenlens as el
from eigenlens.cli import app
from eigenlens.distributed import Cluster, FailedTaskError, LostTaskError, Task
from eigenlens.errors import MissingPackageError
from eigenlens.metrics import answer_loss
from eigenlens.models.packed import PackedModel
from eigenlens.provenance import model_fingerprint
from eigenlens.scoring.scores import STATISTICS

# Not imported here: what Ray reads in the environment, it reads when it is imported.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed"
)
ROOT = Path(__file__).parent.parent
STORE = 100 * 2**20  # bytes; Ray takes no less than 75 MB
DATA = el.load_task("ambiguous", n_train=60, n_validation=20, n_test=20)


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """What processes that Ray starts inherit; a proxy that answers nobody must not matter."""
    os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)  # it stays: a process reads it once
    os.environ["RAY_AUTH_MODE"] = "token"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("http_proxy", "http://127.0.0.1:9")
        patch.setenv("https_proxy", "http://127.0.0.1:9")
        patch.setenv("RAY_worker_niceness", "0")
        yield


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", device="cpu")
    return model, el.decompose(model, progress=False)


def scored(arith, **options):
    model, spectra = arith
    given = {"batch_size": 6, "criterion": "margin", "progress": False} | options
    return el.score(model, spectra, DATA.train, **given)


def assert_same(one, two):
    for name in STATISTICS:
        first, second = one.components[name], two.components[name]
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(two.means.table(), one.means.table(), atol=1e-6)
    frozen = [el.select(s, fraction=0.02) for s in (one, two)]
    columns = ["layer", "matrix", "head", "index"]
    assert frozen[0].components[columns].equals(frozen[1].components[columns])


# Sent by reference, so functions of this module.


def nothing(*values):
    return None


def fails(value):
    raise KeyError(f"no {value}")


def always_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def ones(n, shared=None):
    more = 0 if shared is None else shared.value()[:n].sum()
    return np.ones(n) + more * 0


class KillingMetric:
    """The loss, but whoever computes it first, by the file of that name, ends ``victim``."""

    def __init__(self, marker: Path, victim: str, where: str | None = None) -> None:
        self.marker, self.victim, self.where = str(marker), victim, where

    def __call__(self, logits, batch):
        time.sleep(0.2)  # so that both nodes have work
        until = time.monotonic() + 30
        while not self._here() and not os.path.exists(self.marker) and time.monotonic() < until:
            time.sleep(0.1)  # the other node has to be given some
        if self._here():
            try:
                os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return answer_loss(logits, batch)
            raylet = os.getppid()
            os.kill(raylet if self.victim == "node" else os.getpid(), signal.SIGKILL)
            time.sleep(60)
        return answer_loss(logits, batch)

    def _here(self):
        import ray

        return self.where is None or ray.get_runtime_context().get_node_id() == self.where


class Nodes:
    """A cluster of real nodes, each started by ``ray start``; one processor each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start("--head", "--port=0", "--include-dashboard=false", f"--temp-dir={folder}")
        self.address = (folder / "ray_current_cluster").read_text().strip()
        self.start(f"--address={self.address}")

    def start(self, *options: str) -> None:
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", *options]
        words += ["--num-cpus=1", f"--object-store-memory={STORE}", "--disable-usage-stats"]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def stop(self) -> None:
        """End what was started here, and nothing else."""
        for process in processes_of(self.folder):
            process.kill()


def processes_of(folder):
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def nodes():
    # Sockets lie in the folder, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="rays-", ignore_cleanup_errors=True) as folder:
        made = Nodes(Path(folder))
        yield made
        made.stop()


@in_families(["gpt2", "llama", "gemma3"])
def test_a_packed_model_is_the_same(tiny, family):
    model = tiny(family)
    same = PackedModel.of(model).unpack()
    assert model_fingerprint(same) == model_fingerprint(model)
    spectra = el.decompose(model, progress=False)
    one, two = (el.score(m, spectra, MIXED, progress=False) for m in (model, same))
    assert np.array_equal(one.delta_loss, two.delta_loss)
    with torch.no_grad():
        next(same.parameters()).add_(1)  # a copy of its own, which may be written to
    assert model_fingerprint(same) != model_fingerprint(model)


def test_a_model_with_hooks_is_not_sent(tiny):
    model = tiny("llama")
    scores = el.score(model, el.decompose(model, progress=False), EQUAL, progress=False)
    frozen = el.select(scores, fraction=0.01)
    refused = pytest.raises(ValueError, match=r"has hooks .* leave shards out")
    with el.freeze(model, frozen), refused:
        PackedModel.of(model)
    PackedModel.of(model)


def test_without_ray_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'eigenlens\[ray\]'"):
        Cluster()

    found = CliRunner().invoke(app, ["run", "--ray"])
    assert found.exit_code == 2
    assert "pip install 'eigenlens[ray]'" in found.output


@pytest.mark.parametrize(
    ("words", "address"),
    [(["--ray"], None), (["--ray", "--json"], None), (["--ray", "a:1"], "a:1")],
)
def test_the_option_may_stand_alone(monkeypatch, words, address):
    def cluster(address):
        raise ValueError(f"asked for {address}")

    monkeypatch.setattr("eigenlens.distributed.Cluster", cluster)
    found = CliRunner().invoke(app, ["run", *words])
    assert f"asked for {address}" in found.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "workers=0: at least 1"),
        ({"threads": 0}, "threads=0: at least 1"),
        ({"retries": -1}, "retries=-1: at least 0"),
        ({"address": "here:1", "memory_mb": 100}, "those of the cluster that exists"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Cluster(**options)


@pytest.mark.slow
def test_a_cluster_that_is_started_here(arith, tmp_path, capfd):
    """One start for all: it is what takes time."""
    whole = {c: scored(arith, criterion=c) for c in ("margin", "mean")}
    before = set(Path(tempfile.gettempdir()).glob("eigenlens-ray-*"))
    with Cluster(workers=2, memory_mb=100) as shards:
        folder = shards._folder  # tests beside this one have folders of their own
        assert folder in set(Path(tempfile.gettempdir()).glob("eigenlens-ray-*")) - before
        assert shards.workers == 2
        for criterion, expected in whole.items():
            assert_same(expected, scored(arith, criterion=criterion, shards=shards))
        # A grid of LASER, block by block
        laser = el.baselines.Laser(keep=(0.1,), matrices=("W_Q", "W_out"))
        alone, together = (laser.fit(*arith, DATA, shards=s) for s in (None, shards))
        pd.testing.assert_frame_equal(together.trace, alone.trace, rtol=1e-4)
        assert together.edit.settings == alone.edit.settings
        # A worker killed in the middle
        metric = KillingMetric(tmp_path / "killed", "worker")
        assert_same(whole["margin"], scored(arith, shards=shards, metric=metric))
        assert (tmp_path / "killed").exists()
        # What fails by itself says which task it was, and what was raised there; others are kept
        tasks = [Task("good", ones, (1,)), Task("cell-7", fails, (7,))]
        with pytest.raises(FailedTaskError, match=r"^cell-7 failed: KeyError: 'no 7'") as caught:
            list(shards.results(tasks, name="cells", unit="cell", progress=False))
        assert "in fails" in str(caught.value)
        assert isinstance(caught.value.__cause__, KeyError)
        # In a score it is the error that one process raises, of the first part that fails
        with pytest.raises(ValueError, match=r"The metric of example \d+ is NaN or infinite"):
            scored(arith, shards=shards, metric=_not_a_number)
        # What is lost again and again is given up by name
        shards._retries = 1
        with pytest.raises(LostTaskError, match=r"^cell-9 was given up after 2 tries"):
            list(
                shards.results(
                    [Task("cell-9", always_killed, ())], name="cells", unit="cell", progress=False
                )
            )
        # Progress is seen here
        capfd.readouterr()
        list(
            shards.results([Task("cell-1", nothing, ())], name="cells", unit="cell", progress=True)
        )
        shown = capfd.readouterr().err
        assert "cells: 100%" in shown
        assert "cell-1" in shown
    assert not folder.exists()
    assert not processes_of(folder)


def _not_a_number(logits, batch):
    return logits.sum((1, 2)) * torch.nan


@pytest.mark.slow
def test_a_cluster_that_exists(arith, tmp_path, nodes):
    """Two nodes: a worker is killed, the stores fill, and at last a node leaves."""
    import ray

    whole = scored(arith)
    with Cluster(nodes.address) as shards:
        assert shards.workers == 2
        assert_same(whole, scored(arith, shards=shards))
        metric = KillingMetric(tmp_path / "worker", "worker")
        assert_same(whole, scored(arith, shards=shards, metric=metric))
        # Eight times 40 MB, and 60 MB for all, in stores of 100 MB
        shared = shards.share(np.zeros(60_000_000 // 8))
        tasks = [Task(f"big {i}", ones, (5_000_000, shared)) for i in range(8)]
        found = dict(shards.results(tasks, name="big", unit="task", progress=False))
        assert sorted(found) == list(range(8))
        assert all(value.sum() == 5_000_000 for value in found.values())
        del found
        assert_same(whole, scored(arith, shards=shards))
        here = ray.get_runtime_context().get_node_id()
        (other,) = (n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here)
        metric = KillingMetric(tmp_path / "node", "node", other)
        assert_same(whole, scored(arith, shards=shards, metric=metric))
        assert (tmp_path / "node").exists()
        wait(lambda: shards.workers == 1)


def test_a_cluster_that_does_not_start_leaves_nothing(monkeypatch, tmp_path):
    def too_late(**options):
        assert Path(options["_temp_dir"]).is_dir()
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cluster = Cluster(workers=1)
    cluster._ray = SimpleNamespace(
        is_initialized=lambda: False, init=too_late, shutdown=lambda: None
    )
    with pytest.raises(ValueError, match=r"does not start here .*timed out during startup"):
        cluster.__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere"])
def test_no_cluster_at_an_address(address):
    with pytest.raises(ValueError, match=f"No Ray cluster answers at '{address}'"):
        Cluster(address).__enter__()


def command(out, *more):
    words = "run --search one_shot --fraction 0.02 --criterion margin --refine 0 --batch-size 6"
    sizes = [f"--task-arg={name}" for name in ("n_train=60", "n_validation=20", "n_test=20")]
    code = "from eigenlens.cli import app; app()"
    return [sys.executable, "-c", code, *words.split(), *sizes, "--out", str(out), *more]


@pytest.mark.slow
def test_a_run_whose_driver_is_killed_goes_on(tmp_path):
    subprocess.run(command(tmp_path / "plain"), check=True, capture_output=True)
    out = tmp_path / "rays"
    before = set(Path(tempfile.gettempdir()).glob("eigenlens-ray-*"))
    driver = subprocess.Popen(command(out, "--ray"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait(lambda: (out / "before.parquet").exists() or driver.poll() is not None)
        assert driver.poll() is None, driver.communicate()[1].decode()
    finally:
        driver.kill()
        driver.communicate()
    (left,) = set(Path(tempfile.gettempdir()).glob("eigenlens-ray-*")) - before
    wait(lambda: not processes_of(left))  # what it had started ends with it
    done = subprocess.run(command(out, "--ray"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (el.Scores.load(tmp_path / name / "scores.parquet") for name in ("plain", "rays"))
    assert_same(one, two)
    frozen = [el.FrozenSet.load(tmp_path / n / "frozen.safetensors") for n in ("plain", "rays")]
    assert frozen[0].components.equals(frozen[1].components)
    again = subprocess.run(command(out), capture_output=True, text=True)  # without, it is the same
    assert again.returncode == 0, again.stderr


def wait(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)
