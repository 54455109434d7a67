"""JSON that everybody can read, and tables that come back from it as they were."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from tiny_models import EQUAL

import eigenlens as el
from eigenlens import pipeline
from eigenlens.files import load_record, save_record, write_json
from eigenlens.provenance import Provenance
from eigenlens.tasks import Task

PROVENANCE = Provenance(model="m", model_fingerprint="f", versions={})


def strictly(path):
    """The content of a file that is JSON by the letter of the standard."""

    def refuse(name):
        raise AssertionError(f"{path} holds {name}.")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_numbers_that_json_lacks_become_null(wrong, tmp_path):
    value = {"a": wrong, "b": [1.5, wrong, (2, wrong)], "c": {"d": {"e": wrong}}, "f": "NaN ∞"}
    write_json(tmp_path / "v.json", value)
    found = strictly(tmp_path / "v.json")
    assert found == {"a": None, "b": [1.5, None, [2, None]], "c": {"d": {"e": None}}, "f": "NaN ∞"}
    write_json(tmp_path / "v.json", wrong)
    assert strictly(tmp_path / "v.json") is None


def test_a_record_keeps_missing_numbers_and_none_apart(tmp_path):
    record = {"table": {"x": [math.nan, 1.0], "name": ["a", "b"]}, "seed": None}
    save_record(tmp_path / "r.json", "thing", record)
    assert strictly(tmp_path / "r.json")["table"]["x"] == [None, 1.0]
    found = load_record(tmp_path / "r.json", "thing")
    assert found["seed"] is None
    pd.testing.assert_frame_equal(pd.DataFrame(found["table"]), pd.DataFrame(record["table"]))


@pytest.mark.parametrize("missing", [[math.nan, 2.0], [math.nan, math.nan]])
def test_readouts_and_circuits_come_back_with_missing_numbers(missing, tmp_path):
    table = pd.DataFrame({"token": ["<s>", "b"], "score": missing})
    readout = el.Readout("L0", table, table, table, table, PROVENANCE)
    readout.save(tmp_path / "readout.json")
    strictly(tmp_path / "readout.json")
    again = el.Readout.load(tmp_path / "readout.json")
    pd.testing.assert_frame_equal(again.reads, table)
    circuit = el.Circuit(table, table, table, table, "frozen", 3, PROVENANCE)
    circuit.save(tmp_path / "circuit.json")
    strictly(tmp_path / "circuit.json")
    again = el.Circuit.load(tmp_path / "circuit.json")
    pd.testing.assert_frame_equal(again.nodes, table)
    assert again.provenance == PROVENANCE


def test_metrics_of_a_run_that_freezes_nothing_are_json(tiny, tmp_path):
    """Step 0 of a search has no training loss."""
    config = el.EigenpruneConfig(
        search="learned", search_args={"steps": 1, "every": 1, "lr": 1e-9}, batch_size=6
    )
    task = Task("t", EQUAL, EQUAL, EQUAL)
    result = pipeline.eigenprune(tiny("gpt2"), task, config, out=tmp_path, progress=False)
    assert len(result.frozen) == 0
    chosen = strictly(tmp_path / "metrics.json")["search"]["chosen"]
    assert chosen["step"] == 0
    assert chosen["train_loss"] is None
    again, metrics = pipeline.load_run(tmp_path)
    assert metrics["search"]["chosen"] == chosen
    assert again.search.trace.equals(result.search.trace)
