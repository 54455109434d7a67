"""Ends commands by SIGKILL at random moments, goes on with them, and compares what they wrote.

``python tests/kills.py FOLDER SEED KILLS OPERATION…`` prints a line of JSON for each operation: how
many kills it took, and which files differ from those of an undisturbed process. Everything is
imported once; each attempt is a fork. Half of the kills come after a random time, and half when the
process is about to open, move, make or delete a file for the n-th time.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "BROWSER_PATH": "/none"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pandas as pd
import torch
import yaml
from test_gguf import write_gguf
from tiny_models import write_tiny_model
from tqdm import tqdm

import eigenlens as el
from eigenlens.cli import app
from eigenlens.files import load_record, load_table
from eigenlens.paper.studies import EXPERIMENTS  # noqa: F401  # before the fork

# A child that is killed while it draws a bar must not keep tqdm's lock, which processes share, nor
# a thread of the parent's hold it during a fork.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

FIGURES = Path(__file__).parent.parent / "figures"
FILE_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
IN_A_CHAIN = 4
TIMES = ["seconds", "peak_memory_mb"]
SIZES = {"low": 1, "high": 12, "n_train": 24, "n_validation": 12, "n_test": 12}
SEARCHES = {
    "one_shot": {"fractions": [0.05, 0.2]},
    "iterative": {"steps": 4, "step": 3},
    "guarded": {"steps": 3, "step": 3},
    "learned": {"steps": 12, "every": 2},
}


def command(*words) -> None:
    app([str(word) for word in words], standalone_mode=False)


def run(search: str, shared: Path, own: Path) -> None:
    protect = {"int_mult": {"high": 6}} if search in ("guarded", "learned") else {}
    config = el.EigenpruneConfig(
        model=str(shared / "llama"),
        task="int_add",
        task_args=SIZES,
        search=search,
        search_args=SEARCHES[search],
        protect=protect,
        device="cpu",
        batch_size=12,
    )
    (own / "given.yaml").write_text(config.to_yaml())
    command("run", "--config", own / "given.yaml", "--out", own / "run")


def experiment(shared: Path, own: Path) -> None:
    study = {
        "models": [str(shared / "llama")],
        "tasks": {"sum": {"task": "int_add", "arguments": SIZES, "batch_size": 12}},
        "methods": {
            "before": {"kind": "zero_shot"},
            "ranked": {"kind": "one_shot", "arguments": {"fractions": [0.1]}},
            "random": {"kind": "random_components", "like": "ranked", "draws": 2},
            "LASER": {"kind": "laser", "arguments": {"keep": [0.5], "layers": [0]}},
        },
        "probes": {"product": {"task": "int_mult", "arguments": {"high": 6}}},
    }
    (own / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    parts = ("--config", own / "study.yaml", "--parts", own / "parts")
    command("experiment", "ablations", *parts, "--out", own / "out")


def figures(shared: Path, own: Path) -> None:
    command("figures", "--format", "html", "--out", own / "out")


def report(shared: Path, own: Path) -> None:
    command("report", own / "run")


def cache(shared: Path, own: Path) -> None:
    el.decompose(el.load_model(shared / "llama", device="cpu"), progress=False)


def gguf(shared: Path, own: Path) -> None:
    el.load_model(shared / "tiny.gguf", device="cpu")


OPERATIONS = {
    **{search: lambda *folders, s=search: run(s, *folders) for search in SEARCHES},
    "experiment": experiment,
    "figures": figures,
    "report": report,
    "cache": cache,
    "gguf": gguf,
}


def prepared(operation: str, shared: Path, own: Path) -> Path:
    """A folder with what an operation works on."""
    own.mkdir()
    if operation == "report":
        shutil.copytree(shared / "run", own / "run")
    if operation == "figures":
        (own / "out").mkdir()
        for name in ("gates", "suppressed", "transfer"):
            shutil.copy(FIGURES / f"{name}.parquet", own / "out")
    return own


def start(operation: str, shared: Path, own: Path, fatal: int = 0) -> int:
    """Fork; the child does the operation, and dies at its ``fatal``-th file event, if any."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        seen, log = [0], (own.parent / f"{own.name}.log").open("a")
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        os.environ["EIGENLENS_CACHE"] = str(own / "cache")

        def count(event: str, arguments: tuple) -> None:
            if event in FILE_EVENTS and str(own) in str(arguments[0]):
                seen[0] += 1
                if seen[0] == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        OPERATIONS[operation](shared, own)
        (own.parent / f"{own.name}.events").write_text(str(seen[0]))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int) -> int:
    """The status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(pid: int, after: float) -> bool:
    """Let a child run for some seconds, then kill it; whether it was still running."""
    limit = time.monotonic() + after
    while time.monotonic() < limit:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return ended(pid) == -signal.SIGKILL


def content(path: Path, root: Path) -> object:
    """What a file holds, without how long it took and where the folder lies."""
    if path.name == "metrics.json":
        record = load_record(path, "metrics")
        return {k: v for k, v in record.items() if k != "seconds"}
    if path.suffix == ".json" and path.parent.name == "cells":
        rows = load_record(path, "part")["rows"]
        return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    if path.name == "ablations.parquet":
        table, settings = load_table(path, "experiment")
        return table.drop(columns=TIMES).to_json(), settings
    return path.read_bytes().replace(str(root).encode(), b"")


def contents(folder: Path) -> dict[str, object]:
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")
    return {str(p.relative_to(folder)): content(p, folder) for p in found}


def try_out(operation: str, kills: int, shared: Path, root: Path, rng: random.Random) -> dict:
    """Kill an operation again and again, in folders of their own."""
    whole = prepared(operation, shared, root / operation)
    begin = time.monotonic()
    status = ended(start(operation, shared, whole))
    seconds = time.monotonic() - begin
    if status:
        return {
            "operation": operation,
            "kills": 0,
            "failed": (root / f"{operation}.log").read_text(),
        }
    events, wanted = int((root / f"{operation}.events").read_text()), contents(whole)
    count, failed = 0, []
    while count < kills and not failed:
        own = prepared(operation, shared, root / f"{operation}-{count}")
        for _ in range(min(IN_A_CHAIN, kills - count)):
            if rng.random() < 0.5:
                pid = start(operation, shared, own, fatal=rng.randint(1, events))
                count += ended(pid) == -signal.SIGKILL
            else:
                count += killed(start(operation, shared, own), rng.uniform(0, seconds))
        if ended(start(operation, shared, own)):
            failed.append((root / f"{own.name}.log").read_text()[-3000:])
            break
        found = contents(own)
        differs = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
        failed += [f"{own.name}: {name}" for name in differs]
        shutil.rmtree(own)
    return {"operation": operation, "kills": count, "failed": failed}


def main(folder: str, seed: str, kills: str, *operations: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    shared, root = Path(folder) / "shared", Path(folder) / "tries"
    shared.mkdir(parents=True)
    root.mkdir()
    write_tiny_model("llama", shared / "llama")
    write_gguf(shared / "tiny.gguf")
    if "report" in operations:
        assert ended(start("one_shot", shared, shared)) == 0
    pd.DataFrame().to_parquet(Path(folder) / "warm.parquet")
    for operation in operations:
        rng = random.Random(f"{seed} {operation}")
        print(json.dumps(try_out(operation, int(kills), shared, root, rng)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
