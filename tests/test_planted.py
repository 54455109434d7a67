"""Planted paths: put in exactly, taken out exactly, found where they are."""

import numpy as np
import pytest
import torch

import eigenlens as el
from eigenlens.paper.studies import planted as experiment
from eigenlens.paper.studies.planted import STRENGTHS, Setting, _one_model, _place, planted


def test_a_path_is_added_and_taken_out_exactly(tiny):
    for family in ("gpt2", "llama"):
        model = tiny(family)
        for matrix in el.weight_matrices(model, layers=[1]):
            kept = matrix.weight.clone()
            path = torch.randn(matrix.d_in, matrix.d_out, dtype=kept.dtype)
            head = matrix.n_heads - 1
            with planted(matrix, head, path):
                assert torch.equal(matrix.weight[head], kept[head] + path)
                assert torch.equal(matrix.weight[:head], kept[:head])
            assert torch.equal(matrix.weight, kept)


def test_place_by_hand():
    assert _place(np.array([3.0, -1.0, 2.0]), 1) == {"auroc": 1.0, "rank": 1}
    assert _place(np.array([3.0, -1.0, 2.0]), 2) == {"auroc": 0.5, "rank": 2}
    assert _place(np.array([0.0, 0.0, 0.0]), 0) == {"auroc": 0.5, "rank": 1}


@pytest.mark.slow
def test_the_default_estimator_finds_what_was_planted(monkeypatch):
    setting = Setting("arith-tiny", "int_add", {"high": 20, "n_train": 100}, 1, 100, layers=(1,))
    monkeypatch.setitem(experiment.SETTINGS, "arith-tiny", setting)
    table = _one_model(setting, seed=0)
    assert set(table["aim"]) == set(STRENGTHS)
    seen = table[table["above_noise"] & (table["method"] == "margin")]
    assert len(seen) >= 5
    assert seen["auroc"].mean() > 0.97
    strong = seen[seen["aim"] == 1.0]
    assert strong["exact"].mean() < -0.5  # freezing takes back most of the damage of about 1 nat
