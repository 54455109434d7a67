"""Killed at any moment, a command that is started again ends with what it would have written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kills.py")


def kill(folder, seed, kills, *operations):
    """How many kills a run of the script took; fails where anything differs from undisturbed."""
    given = [sys.executable, SCRIPT, folder, seed, kills, *operations]
    done = subprocess.run([str(word) for word in given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one["operation"] for one in found] == list(operations)
    assert [one["failed"] for one in found] == [[]] * len(operations)
    assert all(one["kills"] >= kills for one in found)
    return sum(one["kills"] for one in found)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path, capsys):
    searches = ("one_shot", "iterative", "guarded", "learned")
    count = kill(tmp_path, 1, 12, *searches, "experiment", "figures", "report", "cache", "gguf")
    with capsys.disabled():
        print(f"\n{count} processes were killed; what they wrote in the end is the same.")
    assert count >= 100
