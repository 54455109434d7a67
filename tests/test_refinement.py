"""Estimates against what they claim: completeness, exactness, hand-computed sums."""

import numpy as np
import pytest
import scipy.stats
from tiny_models import EQUAL, MIXED

import eigenlens as el
from eigenlens.exact import exact_effects
from eigenlens.frozen_set import FrozenSet
from eigenlens.refinement import integrated, refined
from eigenlens.scoring import single_effects
from eigenlens.scoring.by_cache import effects_by_cache


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "phi"))]
)
@pytest.mark.parametrize("data", [pytest.param(EQUAL, marks=pytest.mark.slow), MIXED])
def test_integrated_scores_add_up_to_the_effect_of_freezing_all(tiny, family, data):
    model = tiny(family)
    base = el.score(model, el.decompose(model, progress=False), data, progress=False)
    before = el.evaluate(model, data).loss
    with el.freeze(model, FrozenSet.from_scores(base, np.arange(len(base)))):
        all_frozen = el.evaluate(model, data).loss
    errors = [
        integrated(model, base, data, steps=n, progress=False).delta_loss.sum()
        - (all_frozen - before)
        for n in (2, 64)
    ]
    assert abs(errors[1]) < 1e-4
    assert abs(errors[1]) < abs(errors[0])
    assert el.evaluate(model, data).loss == before


@pytest.mark.parametrize("criterion", ["mean", "margin"])
def test_refined_scores_are_exact_where_all_examples_are_measured(tiny, criterion):
    model = tiny("llama")
    base = el.score(
        model, el.decompose(model, progress=False), MIXED, criterion=criterion, progress=False
    )
    found = refined(model, base, MIXED, count=30, progress=False)
    changed = np.flatnonzero(found.delta_loss != base.delta_loss)
    assert len(changed) == 30
    effects = exact_effects(model, base, changed, MIXED, progress=False)
    np.testing.assert_allclose(found.delta_loss[changed], effects.mean(1), atol=1e-9)
    with pytest.raises(ValueError, match="count=-1"):
        refined(model, base, MIXED, count=-1)
    with pytest.raises(ValueError, match="steps=0"):
        integrated(model, base, MIXED, steps=0)


def test_what_is_no_mean_effect_cannot_be_refined(tiny):
    model = tiny("gpt2")
    spectra = el.decompose(model, progress=False)
    for options in (
        {"criterion": "max"},
        {"criterion": "max_everywhere"},
        {"criterion": "ucb"},
        {"reference": "resample"},
    ):
        base = el.score(model, spectra, MIXED, **options, progress=False)
        with pytest.raises(ValueError, match="does not estimate"):
            refined(model, base, MIXED, count=5, progress=False)


def test_what_is_refined_is_where_the_second_order_term_is_large(tiny):
    model = tiny("llama")
    base = el.score(
        model, el.decompose(model, progress=False), MIXED, criterion="margin", progress=False
    )
    term = base.with_criterion("fisher").delta_loss - base.with_criterion("mean").delta_loss
    top = np.argsort(-term)[:25]
    one = refined(model, base, MIXED.select([1]), count=25, progress=False)
    assert set(np.flatnonzero(one.delta_loss != base.delta_loss)) == set(top)


def test_a_sample_is_corrected_by_regression_on_the_estimates(tiny):
    model = tiny("llama")
    base = el.score(
        model, el.decompose(model, progress=False), MIXED, criterion="margin", progress=False
    )
    data = MIXED.select(range(len(MIXED) - 1))
    found = refined(model, base, data, count=20, progress=False)
    rows = np.flatnonzero(found.delta_loss != base.delta_loss)
    exact = exact_effects(model, base, rows, data, progress=False)
    # estimates of single examples under the means of all, by finite differences of the strength
    step = 1e-4
    effects = exact_effects(model, base, rows, data, strength=step, progress=False) / step
    loss = el.evaluate(model, data).examples["loss"].to_numpy()
    p = np.exp(-loss)
    odds = np.log(p) - np.log1p(-p) - effects / (1 - p)
    estimates = np.log1p(np.exp(-odds)) - loss
    for k, row in enumerate(rows):
        fit = scipy.stats.linregress(estimates[k], exact[k])
        beta = min(max(fit.slope, 0), 1)
        expected = exact[k].mean() + beta * (base.delta_loss[row] - estimates[k].mean())
        assert found.delta_loss[row] == pytest.approx(expected, rel=2e-2, abs=1e-6)


def test_single_effects_add_up_to_the_scores(tiny):
    model = tiny("gpt2")
    base = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    rows = np.arange(len(base))[::-3]
    found = single_effects(model, base, MIXED, rows, batch_size=2, progress=False)
    np.testing.assert_allclose(found.effects.mean(0), base.delta_loss[rows], atol=1e-10)
    np.testing.assert_allclose(found.metric, el.evaluate(model, MIXED).examples["loss"])


def test_estimates_survive_a_round_trip(tiny, tmp_path):
    model = tiny("gpt2")
    base = el.score(model, el.decompose(model, progress=False), MIXED, progress=False)
    found = integrated(model, base, MIXED, steps=2, progress=False)
    found.save(tmp_path / "scores.parquet")
    back = el.Scores.load(tmp_path / "scores.parquet")
    assert back.criterion == "integrated"
    np.testing.assert_array_equal(back.delta_loss, found.delta_loss)
    assert len(el.select(found, 0.1)) == round(0.1 * len(found))


def test_position_fisher_by_hand(tiny):
    model = tiny("llama")
    spectra = el.decompose(model, progress=False)
    scores = el.score(model, spectra, EQUAL, criterion="position_fisher", progress=False)
    effects = effects_by_cache(model, spectra, EQUAL)
    expected = np.concatenate(
        [
            (e.sum(1).mean(0) + e.square().sum(1).mean(0) / 2).flatten().numpy()
            for e in effects.values()
        ]
    )
    np.testing.assert_allclose(scores.delta_loss, expected, atol=1e-10)
