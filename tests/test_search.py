"""Searches: gradients of gates, stopping on validation, a model left as it was."""

import numpy as np
import pytest
import torch

import eigenlens as el
from eigenlens.metrics import answer_logits, answer_loss
from eigenlens.scoring.scorer import mean_effects
from eigenlens.search import gated, iterative, learned
from eigenlens.tasks import make_batches


@pytest.fixture(scope="module")
def arith():
    model = el.load_model("arith-tiny", dtype=torch.float64, device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, n_train=60, n_validation=40, n_test=40)
    return model, el.decompose(model, progress=False), task


def loss(model, data):
    with torch.no_grad():
        values = [
            answer_loss(answer_logits(model, b), b).sum() for b in make_batches(data, model, 60)
        ]
    return float(sum(values)) / len(data)


def test_the_gradient_of_a_gate_is_the_slope_of_the_loss(arith):
    model, spectra, task = arith
    base = el.score(model, spectra, task.train, progress=False)
    gates = torch.tensor(np.random.default_rng(0).uniform(0.05, 0.3, len(base)))
    with el.freeze(model, gated(base, gates)):
        slopes = mean_effects(model, spectra, task.train, base)
    for row in np.argsort(-np.abs(slopes))[:200:40]:
        values = []
        for step in (-1e-5, 1e-5):
            moved = gates.clone()
            moved[row] += step
            with el.freeze(model, gated(base, moved)):
                values.append(loss(model, task.train))
        assert (values[1] - values[0]) / 2e-5 == pytest.approx(slopes[row], rel=1e-4, abs=1e-7)


def test_at_closed_gates_the_gradient_is_the_score(arith):
    model, spectra, task = arith
    base = el.score(model, spectra, task.train, progress=False)
    np.testing.assert_allclose(
        mean_effects(model, spectra, task.train, base), base.delta_loss, atol=1e-10
    )


@pytest.mark.parametrize("hard", [False, True])
def test_learned_gates_help_and_leave_the_model_as_it_was(arith, hard):
    model, spectra, task = arith
    before = loss(model, task.validation)
    found = learned(
        model,
        spectra,
        task.train,
        task.validation,
        steps=30,
        hard=hard,
        sparsity=1e-3,
        batch_size=60,
        progress=False,
    )
    assert loss(model, task.validation) == before
    strength = found.frozen.to_pandas()["strength"]
    assert (strength == 1).all() if hard else (strength < 1).any()
    with el.freeze(model, found.frozen):
        after = el.evaluate(model, task.validation)
    assert after.accuracy == found.trace["accuracy"].max()
    assert after.accuracy > found.trace["accuracy"][0] + 0.2


def test_iterative_takes_the_best_step_of_its_trace(arith):
    model, spectra, task = arith
    found = iterative(
        model, spectra, task.train, task.validation, step=4, steps=4, batch_size=60, progress=False
    )
    assert found.trace["components"].tolist() == [0, 4, 8, 12, 16]
    with el.freeze(model, found.frozen):
        after = el.evaluate(model, task.validation)
    assert after.accuracy == found.trace["accuracy"].max()
    first = el.select(
        el.score(model, spectra, task.train, criterion="margin", progress=False), count=4
    )
    with el.freeze(model, first):
        assert found.trace["accuracy"][1] == el.evaluate(model, task.validation).accuracy
