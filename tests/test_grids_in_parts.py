"""Grids of baselines that are tried in parts find what they find in one piece."""

import pandas as pd
import pytest

import eigenlens as el
from eigenlens import baselines as bl
from eigenlens.provenance import model_fingerprint
from eigenlens.scoring.shards import InTurn

GRIDS = {
    "LoRA": (bl.Lora(ranks=(1, 2), learning_rates=(1e-3, 1e-2), epochs=2), 4),
    "IA3": (bl.Ia3(learning_rates=(1e-2, 1e-1), epochs=2), 2),
    "LASER": (bl.Laser(keep=(0.5, 0.05), matrices=("W_Q", "W_out")), 2),
    "no grid": (bl.Magnitude(), 1),
}


@pytest.fixture(scope="module")
def case():
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("ambiguous", n_train=40, n_validation=20, n_test=10)
    return model, el.decompose(model, progress=False), task


@pytest.mark.parametrize(
    ("grid", "n_parts"),
    [
        pytest.param(*given, id=name, marks=pytest.mark.slow if name in ("LoRA", "IA3") else ())
        for name, given in GRIDS.items()
    ],
)
def test_in_parts_as_in_one_piece(case, grid, n_parts):
    model = case[0]
    before = model_fingerprint(model)
    assert len(grid.parts(model)) == n_parts
    whole, parts = grid.fit(*case), grid.fit(*case, shards=InTurn())
    assert model_fingerprint(model) == before
    assert_same(whole, parts)
    counted = ("forward_passes", "forward_examples", "backward_passes", "backward_examples")
    for name in (*counted, "parameters_changed", "saved_bytes"):
        assert getattr(parts.cost, name) == getattr(whole.cost, name), name


def assert_same(whole, parts):
    assert parts.name == whole.name
    pd.testing.assert_frame_equal(parts.validation.examples, whole.validation.examples)
    assert getattr(parts.edit, "settings", None) == getattr(whole.edit, "settings", None)
    pd.testing.assert_frame_equal(parts.trace, whole.trace)
