"""What is kept is used again under the same conditions only: weights, types, defaults, versions."""

import json
from dataclasses import dataclass, replace

import plotly.graph_objects as go
import pytest
import safetensors.torch

import eigenlens as el
from eigenlens import baselines as bl
from eigenlens import identity, pipeline
from eigenlens.baselines import registry
from eigenlens.paper.studies import estimators, grid, parts
from eigenlens.paper.studies.config import StudyConfig
from eigenlens.paper.studies.grid import run_grid

ROWS = [{"prompt": f"{a} + 3 =", "answer": f" {a + 3}"} for a in range(20)]


@pytest.fixture
def study(tiny_folder, tmp_path, monkeypatch):
    """Runs a study of one ranking on a copy of a tiny model; returns how many cells it fitted."""
    model, data = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    for file in tiny_folder("gpt2").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    data.write_text("\n".join(map(json.dumps, ROWS)))
    fits = []
    fit = bl.baseline.Baseline.fit
    monkeypatch.setattr(bl.baseline.Baseline, "fit", lambda *a, **k: fits.append(a) or fit(*a, **k))
    arguments = {"path": str(data), "n_test": 4, "n_validation": 4}
    methods = {
        "ranked": {"kind": "one_shot", "arguments": {"fractions": [0.1]}},
        "learned": {"kind": "learned", "arguments": {"options": {"steps": 2, "every": 1}}},
    }
    config = StudyConfig(
        models=[str(model)],
        tasks={"own": {"task": "jsonl", "arguments": arguments, "batch_size": 12}},
        methods=methods,
    )

    def run():
        fits.clear()
        run_grid(config, tmp_path / "cells")
        return len(fits)

    assert run() == 2
    assert run() == 0
    return run, model, data


def test_other_weights_are_other_cells(study):
    run, model, _ = study
    file = model / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(n for n in tensors if n.endswith("c_fc.weight"))
    changed = {**tensors, name: tensors[name] + 0.01}
    safetensors.torch.save_file(
        {n: t.clone() for n, t in changed.items()}, file, metadata={"format": "pt"}
    )
    assert run() == 2
    assert run() == 0


@pytest.mark.slow
def test_other_data_of_the_same_name_are_other_cells(study):
    run, _, data = study
    rows = [*ROWS[:-1], {"prompt": "9 + 9 =", "answer": " 18"}]
    data.write_text("\n".join(map(json.dumps, rows)))
    assert run() == 2
    assert run() == 0


@pytest.mark.slow
def test_another_type_or_kind_of_device_is_another_cell(study, monkeypatch):
    run, *_ = study
    monkeypatch.setattr(grid, "load_model", lambda name: el.load_model(name, dtype="float64"))
    assert run() == 2
    assert run() == 0
    conditions = grid.conditions
    monkeypatch.setattr(grid, "conditions", lambda model: {**conditions(model), "device": "cuda"})
    assert run() == 2
    assert run() == 0


def test_conditions_are_those_of_the_model(tiny, monkeypatch):
    model = tiny("gpt2")
    found = identity.conditions(model)
    assert (found["dtype"], found["device"]) == ("float64", "cpu")
    assert found["model"] == el.decompose(model, progress=False).provenance.model_fingerprint


@pytest.mark.slow
def test_another_default_is_another_cell(study, monkeypatch):
    run, *_ = study

    @dataclass(frozen=True)
    class Other(bl.OneShot):
        criterion: str = "max"

    assert Other().criterion != bl.OneShot().criterion
    monkeypatch.setitem(registry.KINDS, "one_shot", Other)
    assert run() == 1
    assert run() == 0
    field = el.LearnedConfig.model_fields["sparsity"]
    monkeypatch.setattr(field, "default", 2.5)
    el.LearnedConfig.model_rebuild(force=True)
    try:
        assert run() == 1
        assert run() == 0
    finally:
        monkeypatch.undo()
        el.LearnedConfig.model_rebuild(force=True)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["score", "studies"])
def test_another_version_of_a_stage_is_another_cell(study, monkeypatch, stage):
    run, *_ = study
    monkeypatch.setitem(identity.VERSIONS, stage, identity.VERSIONS[stage] + 1)
    assert run() == 2
    assert run() == 0


def test_parts_of_estimators_depend_on_all_that_was_chosen(tmp_path, monkeypatch):
    small = {"reading": "product", "n_train": 20, "n_validation": 10, "n_test": 10}
    base = replace(estimators.SETTINGS[0], arguments=small, seeds=(0,))
    made, model = [], el.load_model("arith-tiny", device="cpu")
    monkeypatch.setattr(parts, "load_model", lambda *a, **k: model)
    monkeypatch.setattr(
        estimators, "_measure", lambda *a: made.append(a) or [{"estimator": "mean"}]
    )
    monkeypatch.setattr(estimators, "summary", lambda table: table)
    monkeypatch.setattr(estimators, "figure", lambda table: go.Figure())

    def run(**changes):
        made.clear()
        monkeypatch.setattr(estimators, "SETTINGS", (replace(base, **changes),))
        estimators.run(models=("arith-tiny",), parts=tmp_path)
        return len(made)

    changes = [
        {"n_components": 7},
        {"n_examples": 19},
        {"shares": (0.1,)},
        {"switches": False},
        {"n_refined": 5},
        {"seeds": (1,)},
        {"arguments": {**small, "n_test": 9}},
    ]
    assert [run(), run()] == [1, 0]
    for change in changes:
        assert [run(**change), run(**change)] == [1, 0], change
    assert run() == 0


def test_a_run_goes_on_under_the_same_conditions_only(tiny_folder, tmp_path, monkeypatch):
    arguments = {"low": 1, "high": 12, "n_train": 20, "n_validation": 10, "n_test": 10}
    config = el.EigenpruneConfig(
        model=str(tiny_folder("gpt2")),
        task="int_add",
        task_args=arguments,
        search="learned",
        search_args={"steps": 1, "every": 1},
        protect={},
        device="cpu",
    )
    pipeline.run(config, tmp_path, progress=False)
    pipeline.run(config, tmp_path, progress=False)
    assert el.EigenpruneConfig.from_yaml(tmp_path / "config.yaml") == config
    with monkeypatch.context() as patch:
        patch.setitem(identity.VERSIONS, "score", 2)
        with pytest.raises(ValueError, match=r"another versions \(see the end of config\.yaml"):
            pipeline.run(config, tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("eigenlens.stages.REFINED", 5)
        with pytest.raises(ValueError, match="holds a run with another refine "):
            pipeline.run(config, tmp_path, progress=False)
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(ValueError, match="holds a run with another device "):
        pipeline.run(config, tmp_path, progress=False)
    (tmp_path / "config.yaml").write_text(text.replace('"dropout": 0.2', '"dropout": 0.3'))
    with pytest.raises(ValueError, match="holds a run with another search "):
        pipeline.run(config, tmp_path, progress=False)
