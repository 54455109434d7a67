"""Figures show the numbers that they were given."""

import numpy as np
import pandas as pd
import pytest

import eigenlens as el
from eigenlens.evaluation import Evaluation
from eigenlens.plots.style import signed_log
from eigenlens.provenance import Provenance

PROVENANCE = Provenance(model="none", model_fingerprint="", versions={})


def axes_have_titles(figure):
    axes = [*figure.select_xaxes(), *figure.select_yaxes()]
    return all(axis.title.text for axis in axes)


@pytest.fixture(scope="module")
def found():
    model = el.load_model("arith-tiny", device="cpu")
    task = el.load_task("ambiguous", model.tokenizer, n_train=40, n_validation=30, n_test=30)
    spectra = el.decompose(model, progress=False)
    scores = el.score(model, spectra, task.train, progress=False)
    return el.one_shot(model, scores, task.validation, fractions=(0.01, 0.1))


def test_search_trace_marks_the_chosen_step(found):
    figure = el.plots.search_trace(found)
    by_name = {trace.name: trace for trace in figure.data}
    np.testing.assert_array_equal(
        by_name["validation accuracy"].y, found.trace["validation_accuracy"]
    )
    np.testing.assert_array_equal(by_name["components"].y, found.trace["components"])
    chosen = found.trace.loc[found.trace["chosen"], "step"].iloc[0]
    assert {shape.x0 for shape in figure.layout.shapes} == {chosen}
    assert figure.layout.xaxis3.title.text


def test_exact_against_estimate_shows_every_component():
    estimate, exact = np.array([1.0, -2.0, 1e-7]), np.array([1.1, 0.5, -1e-7])
    strata = np.array([0, 1, 1])
    figure = el.plots.exact_against_estimate(estimate, exact, strata)
    first, second = figure.data[1:]
    np.testing.assert_allclose(first.y, signed_log(exact[:1], 1e-6))
    np.testing.assert_allclose(second.x, signed_log(estimate[1:], 1e-6))
    assert second.name == "0.1% … 1.0%"
    assert axes_have_titles(figure)


def test_faithfulness_names_the_areas():
    curve = pd.DataFrame({"kept": [0.0, 1.0], "faithfulness": [0.0, 1.0]})
    figure = el.plots.faithfulness({"margin": curve})
    assert figure.data[0].name == "margin (CPR 0.50, CMD 0.50)"
    assert axes_have_titles(figure)


def test_example_losses_tells_gained_from_lost():
    def evaluation(losses, correct):
        table = pd.DataFrame({"prompt": list("abcd"), "loss": losses, "correct": correct})
        return Evaluation(table, PROVENANCE)

    before = evaluation([1.0, 0.5, 2.0, 1e-9], [False, True, False, True])
    after = evaluation([0.2, 3.0, 2.5, 0.1], [True, False, False, True])
    figure = el.plots.example_losses(before, after)
    marks = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data[1:]}
    assert marks == {
        "gained (1)": ([1.0], [0.2]),
        "lost (1)": ([0.5], [3.0]),
        "wrong both times (1)": ([2.0], [2.5]),
        "right both times (1)": ([1e-4], [0.1]),  # drawn at the floor
    }
    assert axes_have_titles(figure)
