"""Folders in use, full disks, closed folders, cut files, clocks that jump: nothing is lost."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from test_gguf import write_gguf
from typer.testing import CliRunner

import eigenlens as el
from eigenlens import cache, leftovers, pipeline
from eigenlens.cli import app
from eigenlens.files import (
    UnwritableError,
    atomic_path,
    load_tensors,
    save_table,
    save_tensors,
    write_text,
)
from eigenlens.locks import BusyError, alone, in_turn
from eigenlens.paper.studies.parts import Parts

HOLD = (
    "import fcntl,sys; f = open(sys.argv[1], 'r+'); fcntl.flock(f, 2); print(1); sys.stdin.read()"
)
DATA = ("before.parquet", "scores.parquet", "frozen.safetensors", "trace.parquet", "after.parquet")
CLOSED = Path("/sys/eigenlens")  # the system lets nobody write there
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs a /sys")


@pytest.fixture
def config(tiny_folder):
    return el.EigenpruneConfig(
        model=str(tiny_folder("llama")),
        task="int_add",
        task_args={"low": 1, "high": 12, "n_train": 20, "n_validation": 10, "n_test": 10},
        search="learned",
        search_args={"steps": 4, "every": 2},
        protect={},
        device="cpu",
    )


@contextmanager
def held(file, text="process 4242 on elsewhere"):
    """Another process, which knows nothing of eigenlens, holds the lock of a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    with subprocess.Popen(
        [sys.executable, "-uc", HOLD, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.read(1)
        try:
            yield process
        finally:
            process.kill()


def free(file):
    """Whether another process can have the lock of a file."""
    code = HOLD.replace("(f, 2)", "(f, 6)").replace("sys.stdin.read()", "")
    return subprocess.run([sys.executable, "-c", code, file], capture_output=True).returncode == 0


def written(folder):
    return {name: (folder / name).read_bytes() for name in DATA}


def test_a_second_process_is_refused_by_name_before_anything_is_loaded(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(pipeline, "load_as", lambda config: pytest.fail("loaded"))
    with held(tmp_path / ".lock"):
        with pytest.raises(BusyError, match=rf"{tmp_path} is in use by process 4242 on elsewhere"):
            pipeline.run(config, tmp_path, progress=False)
        done = CliRunner().invoke(app, ["run", "--out", str(tmp_path)])
        assert done.exit_code == 2
        assert "is in use by process 4242" in done.output


def test_a_run_holds_its_folder_and_gives_it_back(config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pipeline, "load_as", lambda c: seen.append(free(tmp_path / ".lock")) or 1)
    with pytest.raises(TypeError):  # that is no model and no task
        pipeline.run(config, tmp_path, progress=False)
    assert seen == [False]
    assert not list(tmp_path.iterdir())
    with held(tmp_path / ".lock") as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        with alone(tmp_path):
            assert not free(tmp_path / ".lock")
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()


def test_a_part_that_another_process_makes_is_waited_for(tmp_path):
    made = Parts(tmp_path / "other")
    rows = made.do("one", lambda: [{"by": "the other process"}])
    lock, found = tmp_path / "mine" / ".one.json.lock", []
    with held(lock) as process, pytest.warns(UserWarning, match="process 4242 on elsewhere: wait"):  # noqa: PT031
        wait = threading.Thread(
            target=lambda: found.append(
                Parts(lock.parent).do("one", lambda: pytest.fail("made twice"))
            )
        )
        wait.start()
        wait.join(0.5)
        assert not found
        (tmp_path / "other" / "one.json").rename(lock.parent / "one.json")
        process.kill()
        wait.join(30)
    assert found == [rows]
    assert [p.name for p in lock.parent.iterdir()] == ["one.json"]


def test_waiters_take_turns(tmp_path):
    """Each deletes the file of the lock, and none is in at the same time as another."""
    inside, most = [], []

    def enter():
        for _ in range(5):
            with in_turn(tmp_path / "x"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    with pytest.warns(UserWarning, match="waiting for it"):  # noqa: PT031
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1] * 20


@contextmanager
def limited(size):
    """No file of this process may grow beyond a size: what a full disk does to a large file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_disk(folder, size):
    """A disk of its own, where the system lets us mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this system mounts no tmpfs for tests")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


FORMS = {
    "text.txt": lambda path: write_text(path, "x" * 100_000),
    "tensors.safetensors": lambda path: save_tensors(path, "t", {"x": torch.zeros(100_000)}),
    "table.parquet": lambda path: save_table(
        path, "t", pd.DataFrame({"x": torch.rand(100_000).numpy()})
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_no_room_is_said_and_what_was_there_stays(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(b"before")
    with limited(10_000), pytest.raises(UnwritableError, match=rf"{name} cannot be .*make room"):
        FORMS[name](path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with (
        small_disk(tmp_path / "disk", 20_480) as disk,
        pytest.raises(UnwritableError, match=r"No space left on device.*make room"),
    ):
        FORMS[name](disk / name)


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(config, tmp_path):
    pipeline.run(config, tmp_path / "whole", progress=False)
    out = tmp_path / "out"
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "whole").iterdir()}
    with (
        limited(sizes["scores.parquet"] - 1),
        pytest.raises(UnwritableError, match=r"scores\.parquet cannot be written \(File too large"),
    ):
        pipeline.run(config, out, progress=False)
    assert sorted(p.name for p in out.iterdir()) == ["before.parquet", "config.yaml"]
    pipeline.run(config, out, progress=False)
    assert written(out) == written(tmp_path / "whole")


@linux
def test_a_closed_folder_is_told_before_anything_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "load_as", lambda config: pytest.fail("loaded"))
    with pytest.raises(UnwritableError, match=r"/sys/eigenlens cannot .*choose a place"):
        pipeline.run(config, CLOSED, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(UnwritableError, match="file cannot be written"):
        pipeline.run(config, tmp_path / "file", progress=False)
    done = CliRunner().invoke(app, ["run", "--out", str(CLOSED)])
    assert done.exit_code == 2
    assert "Error: /sys/eigenlens cannot be written" in " ".join(done.output.split())


@linux
def test_a_cache_that_cannot_be_written_to_is_done_without(tiny, tmp_path, monkeypatch):
    model = tiny("gpt2")
    whole = el.decompose(model, progress=False)
    monkeypatch.setenv("EIGENLENS_CACHE", str(CLOSED))
    with pytest.warns(UserWarning, match=r"cannot be kept in /sys/eigenlens .*EIGENLENS_CACHE"):
        found = el.decompose(model, progress=False)
    assert all(torch.equal(found[name].sigma, whole[name].sigma) for name in whole)
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(UnwritableError, match=r"/sys/eigenlens/models/.* cannot be written"):
        el.load_model(tmp_path / "tiny.gguf", device="cpu")


def bytes_of(tensor):
    """Read without PyTorch, whose threads are not there after a fork."""
    return tensor.detach().numpy().tobytes()


def survives(check):
    """Whether a process finds this true, and does not end by a bus error."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if check() else 1)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_what_was_read_from_the_cache_outlives_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("EIGENLENS_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    large = torch.rand(300, 300)
    cache.kept("abc", lambda: {"x": large})
    found = cache.kept("abc", lambda: pytest.fail("made again"))
    write_gguf(tmp_path / "tiny.gguf")
    model = el.load_model(tmp_path / "tiny.gguf", device="cpu")
    before = [bytes_of(parameter) for parameter in model.parameters()]
    files = [*(tmp_path / "cache").rglob("*.safetensors")]
    assert len(files) == 2
    for file in files:
        os.truncate(file, 100)
    assert survives(lambda: bytes_of(found["x"]) == bytes_of(large))
    assert survives(lambda: [bytes_of(p) for p in model.parameters()] == before)
    assert cache.kept("abc", lambda: {"made": large}).keys() == {"made"}
    el.load_model(tmp_path / "tiny.gguf", device="cpu")


def test_a_clock_that_jumps_changes_nothing(config, tmp_path, monkeypatch):
    whole = pipeline.run(config, tmp_path / "whole", progress=False)
    now, jumps = time.time(), iter(range(10**9))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now + (-1) ** next(jumps) * 1e8)
        pipeline.run(config, tmp_path / "out", progress=False)
        for file in (tmp_path / "out").iterdir():
            os.utime(file, (now + 1e9, now + 1e9))  # written in the future
        (tmp_path / "out" / "after.parquet").unlink()
        again = pipeline.run(config, tmp_path / "out", progress=False)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert all(seconds >= 0 for seconds in (whole.seconds | again.seconds).values())


def test_an_entry_of_the_future_goes_like_any_other(tmp_path, monkeypatch):
    monkeypatch.setenv("EIGENLENS_CACHE", str(tmp_path))
    for key in ("aaa", "bbb"):
        cache.kept(key, lambda: {"x": torch.ones(1000)})
    os.utime(tmp_path / "bases" / "aa" / "aaa.safetensors", (time.time() + 1e9,) * 2)
    cache.trim()
    assert len(cache.entries()) == 2
    cache.trim(0.0)
    assert not cache.entries()


def _no_process():
    return next(pid for pid in range(100_000, 4_000_000) if not psutil.pid_exists(pid))


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path):
    mine = leftovers.temporary_beside(tmp_path / "a.txt")
    left = mine.with_name(mine.name.replace(f"-{os.getpid()}-", f"-{_no_process()}-"))
    elsewhere = left.with_name("." + "f" * 8 + left.name[9:])
    for path in (mine, elsewhere, tmp_path / ".hidden", tmp_path / "plain.txt"):
        path.touch()
    left.mkdir()
    (left / "part").touch()
    save_tensors(tmp_path / "new.safetensors", "t", {"x": torch.ones(1)})
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {mine.name, elsewhere.name, ".hidden", "plain.txt", "new.safetensors"}
    assert load_tensors(tmp_path / "new.safetensors", "t")[0]["x"] == 1


def test_what_a_library_left_beside_goes_as_well(tmp_path, monkeypatch):
    """safetensors writes to a temporary file of its own first, which a killed process leaves."""
    path = tmp_path / "a.safetensors"
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", _no_process)
        killed = atomic_path(path)  # kept, and never left
        (killed.__enter__().parent / ".tmpAbCdEf").touch()
    assert list(tmp_path.rglob(".tmp*"))
    save_tensors(path, "t", {"x": torch.ones(1)})
    assert list(tmp_path.iterdir()) == [path]
