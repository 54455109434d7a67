"""Scores and edits of millions of components stay columns: memory is that of the numbers."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from eigenlens import files
from eigenlens.files import FileFormatError, load_arrays, save_table

# In a process of its own, whose peak is that of this alone.
CODE = """
import sys
from pathlib import Path
import numpy as np, pandas as pd
from eigenlens.bench import resident
from eigenlens.frozen_set import FrozenSet
from eigenlens.position_means import PositionMeans, Positions
from eigenlens.provenance import Provenance
from eigenlens.scoring import Scores
from eigenlens.scoring.scores import STATISTICS

n, width, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])

def made(n):
    random = np.random.default_rng(0)
    kinds = np.array(["W_Q", "W_K", "W_V", "W_O"], dtype=object)
    components = pd.DataFrame({
        "layer": np.arange(n) // 100_000,
        "matrix": pd.Series(kinds[np.arange(n) // 25_000 % 4], dtype="str"),
        "head": np.arange(n) // 100 % 250,
        "index": np.arange(n) % 100,
        "sigma": random.random(n),
    }).assign(**{name: random.random(n) for name in STATISTICS})
    values = random.random((n, width), dtype=np.float32)
    means = PositionMeans(Positions(-width, 0), np.ones(width, np.int64), values, values[:, 0])
    provenance = Provenance(model="m", model_fingerprint="f", versions={})
    return Scores(components, means, "mean", "mean", 10, provenance)

def around(what, size):
    before = resident.forget_peak()
    what()
    print((resident.peak() - before) / size)

made(1000).save(folder / "first")
Scores.load(folder / "first")
scores = made(n)
size = scores.means.values.nbytes + int(scores.components.memory_usage(deep=False).sum())
around(lambda: scores.save(folder / "scores.parquet"), size)
frozen = FrozenSet.from_scores(scores, np.arange(n))
del scores
around(lambda: frozen.save(folder / "frozen.safetensors"), size)
del frozen
around(lambda: Scores.load(folder / "scores.parquet"), size)
around(lambda: FrozenSet.load(folder / "frozen.safetensors"), size)
back = Scores.load(folder / "scores.parquet")
again = made(n)
pd.testing.assert_frame_equal(back.components, again.components)
np.testing.assert_array_equal(back.means.values, again.means.values)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows", [400_000, pytest.param(4_000_000, marks=pytest.mark.slow)], ids="{:,}".format
)
def test_memory_for_files_is_that_of_their_numbers(tmp_path, rows):
    command = [sys.executable, "-c", CODE, str(rows), "50", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    save, save_edit, load, load_edit = map(float, said.stdout.split())
    # Of all numbers: the columns that are joined, and a part of the rows; written whole it was 4.5.
    assert save < 1.2
    assert save_edit < 0.5
    # What is read, its table once more as pandas has it, and a part of the rows.
    assert load < 3
    assert load_edit < 1.2


def table(n):
    return pd.DataFrame({"x": np.arange(n), "name": [f"row {i}" for i in range(n)]})


def test_rows_are_written_and_read_in_parts(tmp_path, monkeypatch):
    array = np.random.default_rng(0).random((10, 3))
    save_table(tmp_path / "whole", "thing", table(10), {"a": 1}, {"mean": array})
    monkeypatch.setattr(files, "_ROWS", 4)
    save_table(tmp_path / "parts", "thing", table(10), {"a": 1}, {"mean": array})
    assert pq.ParquetFile(tmp_path / "parts").num_row_groups == 3
    for name in ("whole", "parts"):
        found, metadata, arrays = load_arrays(tmp_path / name, "thing")
        pd.testing.assert_frame_equal(found, table(10))
        assert metadata == {"a": 1}
        np.testing.assert_array_equal(arrays["mean"], array)
    # one that any reader of parquet reads
    other = pd.read_parquet(tmp_path / "parts")
    np.testing.assert_array_equal(np.stack(other["mean"]), array)


@pytest.mark.parametrize("n", [0, 1])
def test_tables_of_few_rows_and_columns(tmp_path, n):
    for width in (0, 2):
        array = np.ones((n, width), np.float32)
        save_table(tmp_path / "t", "thing", table(n), None, {"mean": array})
        found, _, arrays = load_arrays(tmp_path / "t", "thing")
        assert list(found["x"]) == list(range(n))
        assert arrays["mean"].shape == (n, width)
        assert arrays["mean"].dtype == np.float32


def test_any_byte_of_a_file_in_parts_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_ROWS", 4)
    path = tmp_path / "t"
    save_table(path, "thing", table(10), {"a": 1}, {"mean": np.ones((10, 2))})
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FileFormatError):
            load_arrays(path, "thing")
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            load_arrays(path, "thing")
