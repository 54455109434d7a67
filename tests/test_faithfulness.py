"""Exact effects against freezing one by one; statistics against hand-computed cases."""

import numpy as np
import pandas as pd
import pytest
from tiny_models import EQUAL, MIXED, in_families

import eigenlens as el
from eigenlens.exact import exact_effects
from eigenlens.faithfulness import (
    agreement,
    bootstrap_scores,
    curve_areas,
    faithfulness_curve,
    set_effects,
    stability,
    stratified_sample,
    top_k,
)
from eigenlens.frozen_set import FrozenSet
from eigenlens.scoring import single_effects


def losses(model, data):
    return el.evaluate(model, data).examples["loss"].to_numpy()


@in_families()
@pytest.mark.parametrize(
    ("strength", "batch_size"), [pytest.param(1.0, 3, marks=pytest.mark.slow), (0.3, 1)]
)
def test_exact_effects_equal_freezing_one_by_one(tiny, family, strength, batch_size):
    """Also with padding, several components of a matrix, all layers, one example at a time."""
    model = tiny(family)
    scores = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    rows = np.random.default_rng(0).choice(len(scores), 24, replace=False)
    found = exact_effects(
        model, scores, rows, MIXED, strength=strength, batch_size=batch_size, progress=False
    )
    before = losses(model, MIXED)
    for row, effect in zip(rows, found, strict=True):
        with el.freeze(model, FrozenSet.from_scores(scores, np.array([row]), strength)):
            np.testing.assert_allclose(effect, losses(model, MIXED) - before, atol=1e-9)
    assert np.abs(found).max() > 1e-5
    np.testing.assert_array_equal(losses(model, MIXED), before)


def test_exact_effects_on_other_data_use_the_mean_over_positions(tiny):
    """Positions that scoring never saw fall back, as they do when a set is frozen."""
    model = tiny("llama")
    scores = el.score(model, el.decompose(model, progress=False), EQUAL, progress=False)
    rows = np.arange(0, len(scores), 97)
    found = exact_effects(model, scores, rows, MIXED, progress=False)
    before = losses(model, MIXED)
    for row, effect in zip(rows, found, strict=True):
        with el.freeze(model, FrozenSet.from_scores(scores, np.array([row]))):
            np.testing.assert_allclose(effect, losses(model, MIXED) - before, atol=1e-9)


def test_agreement_by_hand():
    exact = np.array([1.0, 2.0, 3.0, -4.0, 1e-9])
    estimate = np.array([2.0, 1.0, 3.0, -1.0, -5.0])
    table = agreement(estimate, exact, np.array([0, 0, 0, 1, 1]), floor=1e-6)
    overall, first, second = (row for _, row in table.iterrows())
    # Ranks of exact 3 4 5 1 2, of estimate 4 3 5 2 1: four squared differences of 1.
    assert overall["spearman"] == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert overall["kendall"] == pytest.approx((8 - 2) / 10)
    assert overall["pearson"] == pytest.approx(np.corrcoef(estimate, exact)[0, 1])
    assert overall["sign"] == 1
    assert overall["n_sign"] == 4
    assert first["spearman"] == pytest.approx(0.5)
    assert second["n"] == 2
    assert second["n_sign"] == 1


def test_agreement_with_constants_is_not_defined():
    table = agreement(np.zeros(3), np.arange(3.0))
    assert np.isnan(table["spearman"][0])
    assert table["sign"][0] == 0  # of the two effects that are not zero


def test_top_k_by_hand():
    exact = np.array([-5.0, -3.0, 0.0, 4.0])
    estimate = np.array([-1.0, 2.0, -2.0, 3.0])
    assert top_k(estimate, exact, 2) == {"recall": 0.5, "regret": 3.0}
    assert top_k(exact, exact, 3) == {"recall": 1.0, "regret": 0.0}
    with pytest.raises(ValueError, match="k=5"):
        top_k(estimate, exact, 5)


def test_stratified_sample_draws_the_largest_most_densely():
    values = np.random.default_rng(0).normal(size=2000) ** 3
    drawn = stratified_sample(values, 50, seed=3)
    assert len(drawn) == drawn["row"].nunique() == 50
    order = np.argsort(-np.abs(values))
    rank = pd.Series(np.empty(2000), index=order)
    rank[order] = np.arange(2000)
    ends = [2, 20, 200, 1000, 2000]
    for stratum, part in drawn.groupby("stratum"):
        ranks = rank[part["row"]]
        assert (ranks < ends[stratum]).all()
        assert stratum == 0 or (ranks >= ends[stratum - 1]).all()
    assert (drawn["stratum"] == 0).sum() == 2  # all there are; later strata make up for it
    with pytest.raises(ValueError, match="n=0"):
        stratified_sample(values, 0)
    with pytest.raises(ValueError, match="must rise to 1"):
        stratified_sample(values, 5, strata=(0.5, 0.1))


def test_curve_areas_by_hand():
    curve = pd.DataFrame({"kept": [0.0, 0.5, 1.0], "faithfulness": [0.0, 1.5, 1.0]})
    areas = curve_areas(curve)
    assert areas["cpr"] == pytest.approx(0.5 * 0.75 + 0.5 * 1.25)
    assert areas["cmd"] == pytest.approx(0.5 * 0.75 + 0.5 * 0.25)


def test_faithfulness_runs_from_none_to_all(tiny):
    model = tiny("gpt2")
    scores = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    curve = faithfulness_curve(model, scores, MIXED, kept=(0.25,))
    assert curve["kept"].tolist() == [0.0, 0.25, 1.0]
    assert curve["faithfulness"].iloc[[0, 2]].tolist() == [0.0, 1.0]
    assert curve["metric"].iloc[2] == pytest.approx(losses(model, MIXED).mean())
    lowest = el.select(scores, count=len(scores) - round(0.25 * len(scores)))
    with el.freeze(model, lowest):
        expected = losses(model, MIXED).mean()
    none, some, all_ = curve["metric"]
    assert some == pytest.approx(expected)
    assert curve["faithfulness"][1] == pytest.approx((some - none) / (all_ - none))
    with pytest.raises(ValueError, match="shares lie in"):
        faithfulness_curve(model, scores, MIXED, kept=(1.5,))


def test_set_effects_compare_sums_with_what_happens(tiny):
    model = tiny("llama")
    scores = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    rows = np.array([3, 50, 200])
    frozen = FrozenSet.from_scores(scores, rows, np.array([1e-4, 2e-4, 1e-4]))
    found = set_effects(model, scores, {"three": frozen}, MIXED).iloc[0]
    by_hand = (scores.delta_loss[rows] * [1e-4, 2e-4, 1e-4]).sum()
    assert found["predicted"] == pytest.approx(by_hand)
    assert found["real"] == pytest.approx(by_hand, rel=1e-2)  # a derivative, at small strengths


def test_stability_of_the_same_and_of_the_opposite():
    values = np.arange(10.0)
    same = stability(np.stack([values, values, values]), 3)
    assert same == {"spearman": pytest.approx(1.0), "jaccard": 1.0}
    opposite = stability(np.stack([values, -values]), 5)
    assert opposite == {"spearman": pytest.approx(-1.0), "jaccard": 0.0}
    with pytest.raises(ValueError, match="two resamples"):
        stability(values[None], 3)


@pytest.mark.parametrize("criterion", ["mean", "fisher", "margin", "ucb"])
def test_bootstrap_scores_are_scores_of_resamples(tiny, criterion):
    """Stored effects, weighted anew, are what scoring the resample under the same means gives."""
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    scores = el.score(model, spectra, MIXED, criterion=criterion, progress=False)
    single = single_effects(model, scores, MIXED, progress=False)
    found = bootstrap_scores(single, n_resamples=3, seed=1)
    counts = np.random.default_rng(1).multinomial(len(MIXED), np.full(len(MIXED), 1 / len(MIXED)))
    resample = MIXED.select(np.repeat(np.arange(len(MIXED)), counts))
    first = el.score(model, spectra, resample, criterion=criterion, means=scores, progress=False)
    np.testing.assert_allclose(found[0], first.delta_loss, atol=1e-10)
    assert found.shape == (3, len(first))
    assert not np.allclose(found[0], found[1])
