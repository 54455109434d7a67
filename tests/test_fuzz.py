"""Damaged files of every kind: a clean error that names the file, or the right result.

A case is a reader and a seed. ``FUZZ_SEED=7 pytest 'tests/test_fuzz.py::test_fuzz[scores]'`` runs
one of them alone.
"""

import os
import random
import resource
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from damage import damaged
from datasets.utils.logging import disable_progress_bar
from fuzzed import Reader, Sample
from fuzzed_inputs import INPUTS
from fuzzed_results import RESULTS
from tiny_models import MIXED

import eigenlens as el

pytestmark = pytest.mark.slow
READERS = INPUTS | RESULTS
SECONDS, GIGABYTES = 10, 4  # what one case may take


class Hang(BaseException):
    """Not an ``Exception``, so that no reader takes it for damage."""


@contextmanager
def limited():
    """Little time and memory."""

    def ring(*_: Any) -> None:
        raise Hang(f"took more than {SECONDS} s")

    with Path("/proc/self/statm").open() as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, ring), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + GIGABYTES * 2**30, before[1][1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before[0])
        resource.setrlimit(resource.RLIMIT_AS, before[1])


def complaint(reader: Reader, path: Path, content: bytes, whole: Any, sample: Sample) -> str | None:
    """What is wrong with how damaged bytes are read, if anything."""
    try:
        with limited():
            found = reader.read(path, sample)
    except reader.errors as error:
        text = str(error)
        if type(error) not in reader.errors:
            return f"raises {error!r}"
        if path.name not in text or "\n" in text or len(text) > 3000:
            return f"says {text[:3000]!r}"
        return None
    except (Exception, Hang) as error:
        return f"raises {error!r}"
    try:
        right = reader.right(content, found, whole)
    except Exception as error:
        return f"reads what cannot be read: {error!r}"
    return None if right else f"reads {found!r}"[:3000]


@pytest.fixture(scope="module")
def sample(tiny):
    model = tiny("gpt2")
    scores = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    frozen = el.select(scores, 0.5)
    change = el.activation_change(model, frozen, MIXED)
    return Sample(model, scores, frozen, change, el.evaluate(model, MIXED))


@pytest.fixture(autouse=True)
def _as_users_run_it(monkeypatch, tmp_path):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setenv("EIGENLENS_CACHE", str(tmp_path / "cache"))
    disable_progress_bar()


done = dict.fromkeys(READERS, 0)


@pytest.mark.parametrize("name", READERS)
def test_fuzz(name, sample, tmp_path):
    reader = READERS[name]
    path = tmp_path / reader.file
    path.parent.mkdir(parents=True, exist_ok=True)
    reader.write(path, sample)
    whole = path.read_bytes()
    undamaged = reader.read(path, sample)
    assert reader.right(whole, undamaged, undamaged)
    seeds = [int(os.environ["FUZZ_SEED"])] if "FUZZ_SEED" in os.environ else range(reader.cases)
    failed = []
    for seed in seeds:
        content = damaged(whole, random.Random(f"{name} {seed}"))
        path.unlink(missing_ok=True)  # what was read before may be a view of the old file
        path.write_bytes(content)
        problem = complaint(reader, path, content, undamaged, sample)
        if problem is not None:
            failed.append(f"{name}, FUZZ_SEED={seed}: {problem}")
        done[name] += 1
        if len(failed) == 10:
            break
    assert not failed, "\n".join(failed)


def test_there_are_enough_cases(capsys):
    with capsys.disabled():
        print(f"\n{sum(done.values()):,} damaged files were read by {len(READERS)} readers.")
    assert sum(reader.cases for reader in READERS.values()) >= 10_000
