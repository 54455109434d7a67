"""Budgets are exact, whatever they are counted over."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eigenlens as el
from eigenlens.position_means import PositionMeans, Positions
from eigenlens.provenance import Provenance

KINDS = ["W_Q"] * 60 + ["W_in"] * 25 + ["W_out"] * 15


def scores(values, criterion="mean"):
    n = len(KINDS)
    table = pd.DataFrame(
        {
            "layer": np.arange(n) % 3,
            "matrix": KINDS,
            "head": 0,
            "index": np.arange(n),
            "sigma": 1.0,
            "effect": values,
            "margin": values,
            "std": 0.5,
            "worst": np.abs(values),
        }
    )
    provenance = Provenance(model="m", model_fingerprint="f", versions={})
    means = PositionMeans(Positions(-2, 0), np.array([4, 4]), np.zeros((n, 2)), np.zeros(n))
    return el.Scores(table, means, criterion, "mean", 4, provenance)


VALUES = np.random.default_rng(0).permutation(np.linspace(-1, 1, 100))


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1))
def test_a_fraction_freezes_exactly_that_many_of_the_lowest(fraction):
    frozen = el.select(scores(VALUES), fraction)
    assert len(frozen) == round(fraction * 100)
    chosen = set(frozen.to_pandas()["index"])
    assert chosen == set(np.argsort(VALUES)[: len(frozen)])


def test_shares_per_matrix_and_layer():
    """Pitfall 3: a quota per matrix sliced the global list, and the budget was another."""
    by_matrix = el.select(scores(VALUES), 0.2, within="matrix").to_pandas()
    assert by_matrix["matrix"].value_counts().to_dict() == {"W_Q": 12, "W_in": 5, "W_out": 3}
    worst = VALUES[by_matrix.loc[by_matrix.matrix == "W_in", "index"]].max()
    assert worst == np.sort(VALUES[60:85])[4]
    by_layer = el.select(scores(VALUES), count=7, within="layer").to_pandas()
    assert by_layer["layer"].value_counts().to_dict() == {0: 7, 1: 7, 2: 7}


def test_negative_only_leaves_the_rest_of_the_budget():
    assert len(el.select(scores(VALUES), 0.9, negative_only=True)) == 50
    assert len(el.select(scores(VALUES, "max"), 0.9, negative_only=True)) == 0
    assert len(el.select(scores(VALUES, "max"), 0.9)) == 90


def test_criteria_rank_differently():
    by_mean, by_max = (
        el.select(scores(VALUES), count=10),
        el.select(scores(VALUES, "max"), count=10),
    )
    assert set(by_mean.to_pandas()["index"]) == set(np.argsort(VALUES)[:10])
    assert set(by_max.to_pandas()["index"]) == set(np.argsort(np.abs(VALUES))[:10])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.2}, r"1\.2 lies outside \[0, 1\]"),
        ({"fraction": -0.1}, "outside"),
        ({}, "either"),
        ({"fraction": 0.1, "count": 3}, "either"),
        ({"count": 101}, "count=101"),
        ({"count": -1}, "count=-1"),
        ({"fraction": 0.1, "within": "head"}, "within='head'"),
    ],
)
def test_bad_budgets(options, message):
    with pytest.raises(ValueError, match=message):
        el.select(scores(VALUES), **options)


def test_nan_scores_have_no_order():
    values = VALUES.copy()
    values[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        el.select(scores(values), 0.1)
