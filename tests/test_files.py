"""Files that everybody can read, that come back as they were, and that tell damage."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import EQUAL

import eigenlens as el
from eigenlens import cache, files, pipeline, run_folder
from eigenlens.files import (
    FileFormatError,
    load_arrays,
    load_record,
    load_tensors,
    read_yaml,
    save_record,
    save_table,
    save_tensors,
    write_json,
)
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
    again, metrics = run_folder.load_run(tmp_path)
    assert metrics["search"]["chosen"] == chosen
    assert again.search.trace.equals(result.search.trace)


TENSORS = {
    "a": torch.tensor([1.5, -2.0]).bfloat16(),
    "b": torch.tensor(7),
    "c": torch.zeros(0, 3, dtype=torch.float64),
    "d": torch.tensor([[True], [False]]),
}
TABLE = pd.DataFrame({"x": [1.0, np.nan, 3.0], "name": ["a", None, "ü"], "n": [1, 2, 3]})
MEANS = {"mean": np.arange(6.0).reshape(3, 2), "none": np.zeros((3, 0), np.float32)}


def save_each(folder):
    """A small file of each form, and how it is read."""
    save_tensors(folder / "t.safetensors", "thing", TENSORS, {"note": "n"})
    save_table(folder / "t.parquet", "thing", TABLE, {"note": "n"}, MEANS)
    save_record(folder / "t.json", "thing", {"x": [1.5, None], "note": "n"})
    return {"safetensors": load_tensors, "parquet": load_arrays, "json": load_record}


@pytest.mark.parametrize("form", ["safetensors", "parquet", "json"])
def test_every_byte_of_a_result_counts(form, tmp_path):
    """Any byte that changes is told, unless what is read stays the same."""
    load = save_each(tmp_path)[form]
    path = tmp_path / f"t.{form}"
    whole, found = path.read_bytes(), repr(load(path, "thing"))
    told = 0
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert repr(load(path, "thing")) == found
        except FileFormatError as error:
            assert path.name in str(error)  # noqa: PT017
            told += 1
    assert told > len(whole) / 3 * (0.5 if form == "json" else 0.75)


def test_results_come_back_and_others_can_read_them(tmp_path):
    save_each(tmp_path)
    tensors, note = load_tensors(tmp_path / "t.safetensors", "thing")
    assert note == {"note": "n"}
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items()
    )
    table, note, means = load_arrays(tmp_path / "t.parquet", "thing")
    assert note == {"note": "n"}
    pd.testing.assert_frame_equal(table, TABLE)
    assert all(np.array_equal(means[k], v) for k, v in MEANS.items())
    (tmp_path / "mine").touch()
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    plain = pd.read_parquet(tmp_path / "t.parquet")  # the checksum is in no other reader's way
    pd.testing.assert_frame_equal(plain[list(TABLE)], TABLE)


@pytest.mark.parametrize("form", ["safetensors", "parquet", "json"])
def test_files_of_other_formats_are_refused_by_name(form, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_FORMAT", "1")
    load = save_each(tmp_path)[form]
    monkeypatch.undo()
    with pytest.raises(FileFormatError, match=rf"t\.{form} is a thing file of format 1"):
        load(tmp_path / f"t.{form}", "thing")


def test_a_damaged_decomposition_in_the_cache_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("EIGENLENS_CACHE", str(tmp_path))
    cache.kept("abc", lambda: TENSORS)
    path = tmp_path / "bases" / "ab" / "abc.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    assert cache.kept("abc", lambda: {"made": torch.ones(1)}).keys() == {"made"}
    assert cache.kept("abc", dict).keys() == {"made"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' comes twice"),
        ("x: {y: {a: 1, a: 1}}", "the key 'a' comes twice"),
        ("a: !!int x", "is not valid YAML"),
        ("a: !!bool x", "is not valid YAML"),
        ("a: !!timestamp x", "is not valid YAML"),
        ("a: 2020-99-99", "month must be in"),
        ("a: " + "9" * 5000, "is not valid YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: &a [*a]", "alias"),
        ("1: 2", "mapping of options"),
        ("- a", "mapping of options"),
        ("", "mapping of options"),
        ("a: *b", "undefined alias 'b'"),
        ("a: \ud800", "is not valid YAML"),
    ],
)
def test_yaml_that_cannot_be_meant(text, told, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FileFormatError, match=rf"c\.yaml .*{told}") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("link", ["[{last}, {last}]", "{{<<: [{last}, {last}]}}"])
def test_yaml_aliases_do_not_explode(link, tmp_path):
    """Thirty lines that stand for a thousand million values."""
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{n}: &a{n} " + link.format(last=f"*a{n - 1}") for n in range(1, 31)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(FileFormatError, match=r"bomb\.yaml .*100,000 values"):
        read_yaml(tmp_path / "bomb.yaml")
    (tmp_path / "few.yaml").write_text("\n".join(lines[:5]))
    assert read_yaml(tmp_path / "few.yaml")["a0"] == {"k": 1}


def test_a_wrong_value_names_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("seed: x")
    with pytest.raises(ValueError, match=r"c\.yaml: The configuration is not valid\. seed: "):
        el.EigenpruneConfig.from_yaml(tmp_path / "c.yaml")
