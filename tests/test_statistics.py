"""Intervals cover what they say they cover: by exact sums over outcomes, and by seeded draws."""

from itertools import product

import numpy as np
import pytest
import scipy.stats

from eigenlens.statistics import (
    balance,
    bootstrap_interval,
    mcnemar,
    paired_interval,
    repeated_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "n"), [(11, 80), (0, 50), (50, 50), (1, 2)])
def test_wilson_is_scipys(right, n):
    truth = scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, n) == pytest.approx((truth.low, truth.high), abs=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.87])
def test_wilson_covers(share):
    counts = np.arange(51)
    bounds = np.array([wilson_interval(int(right), 50) for right in counts])
    covered = (bounds[:, 0] <= share) & (share <= bounds[:, 1])
    assert 0.93 < scipy.stats.binom.pmf(counts[covered], 50, share).sum() < 0.98


def test_paired_interval_of_the_literature():
    """Newcombe 1998, table II: 36, 12, 2, 0 by method 10."""
    assert paired_interval(36, 12, 2, 0) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    low, high = paired_interval(36, 2, 12, 0)
    assert (low, high) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def test_what_was_gained_every_time_is_not_certain():
    low, high = paired_interval(0, 25, 0, 0)
    assert 0.75 < low < 0.9
    assert high == 1
    low, high = paired_interval(20, 0, 0, 5)  # nothing changed
    assert low < 0 < high
    assert low == pytest.approx(-high)


@pytest.mark.parametrize(
    "chances",  # both, gained, lost, neither
    [(0.1, 0.6, 0.05, 0.25), (0.4, 0.1, 0.1, 0.4), (0.0, 0.9, 0.0, 0.1), (0.85, 0.05, 0.02, 0.08)],
)
def test_paired_interval_covers(chances):
    n, change = 8, chances[1] - chances[2]
    cells = [
        (a, b, c, n - a - b - c) for a, b, c in product(range(n + 1), repeat=3) if a + b + c <= n
    ]
    covered = 0.0
    for cell, chance in zip(cells, scipy.stats.multinomial.pmf(cells, n, chances), strict=True):
        low, high = paired_interval(*cell)
        covered += chance * (low <= change <= high)
    assert covered > 0.92


def drawn(share, spread, seeds, shared, rng):
    """Right examples of seeds whose own chances scatter around ``share``, 50 prompts each.

    ``spread`` is the correlation of two examples of a seed. Where prompts are shared, each has a
    difficulty of its own, the same for every seed.
    """
    scale = 1 / spread - 1 if spread else 1e9
    chances = rng.beta(share * scale, (1 - share) * scale, seeds)
    if not shared:
        return rng.binomial(50, chances)
    return (rng.random(50)[None] < chances[:, None]).sum(1)


def coverage(interval, share, spread, seeds, shared, n_runs=300):
    rng = np.random.default_rng(0)
    found = [interval(drawn(share, spread, seeds, shared, rng)) for _ in range(n_runs)]
    return np.mean([low <= share <= high for low, high in found])


def naive(right):
    return wilson_interval(int(right.sum()), 50 * len(right))


@pytest.mark.parametrize(("seeds", "share"), [(2, 0.35), (3, 0.35), (3, 0.87), (5, 0.87)])
@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize("shared", [False, True])
def test_seeds_are_covered_and_would_not_be_by_adding_them_up(seeds, share, spread, shared):
    def interval(right):
        return repeated_interval(right.tolist(), [50] * seeds, 50 if shared else 50 * seeds)

    assert coverage(interval, share, spread, seeds, shared) > 0.92
    if spread or shared:
        assert coverage(naive, share, spread, seeds, shared) < 0.88


def test_near_all_right_intervals_cover_less_than_they_say():
    """The figures that the docs tell: seeds which are all right show no spread."""

    def interval(right):
        return repeated_interval(right.tolist(), [50] * 3, 150)

    assert coverage(interval, 0.97, 0.1, 3, False, n_runs=2000) == pytest.approx(0.79, abs=0.03)
    bounds = np.array([wilson_interval(right, 50) for right in range(51)])
    shares = np.linspace(0.9, 0.9999, 1000)[:, None]
    covered = (bounds[:, 0] <= shares) & (shares <= bounds[:, 1])
    chances = scipy.stats.binom.pmf(np.arange(51), 50, shares)
    assert (covered * chances).sum(1).min() == pytest.approx(0.84, abs=0.005)


def test_repeated_interval_by_hand():
    """54, 32 and 20 % are not 35 % of 150 independent examples."""
    low, high = repeated_interval([27, 16, 10], [50] * 3, 150)
    shares = np.array([0.54, 0.32, 0.20])
    t = 4.302653  # two degrees of freedom
    half = t * shares.std(ddof=1) / 3**0.5
    worth = 1.959964**2 * shares.mean() * (1 - shares.mean()) / half**2
    assert (low, high) == pytest.approx(wilson_interval(shares.mean() * worth, worth), abs=1e-6)
    assert low < 0.12
    assert high > 0.7
    assert repeated_interval([50, 50], [50, 50], 100) == wilson_interval(100, 100)
    assert repeated_interval([50, 50], [50, 50], 50) == wilson_interval(50, 50)
    assert repeated_interval([20], [50], 50) == wilson_interval(20, 50)
    # Draws that agree on shared prompts are worth these prompts, and no more.
    assert repeated_interval([20] * 9, [50] * 9, 50) == pytest.approx(wilson_interval(20, 50))


@pytest.mark.parametrize(
    ("right", "n", "distinct"), [([], [], 1), ([1, 1], [4, 4], 9), ([1, 1], [4, 4], 3)]
)
def test_repetitions_that_cannot_be(right, n, distinct):
    with pytest.raises(ValueError, match="cannot have"):
        repeated_interval(right, n, distinct)


def test_mcnemar_by_prompt():
    assert mcnemar(3, 1) == pytest.approx(2 * (1 + 4) / 16)
    assert mcnemar(0, 0) == 1.0
    # Three seeds on the same two prompts are two prompts.
    assert balance({"a": 3, "b": 1, "c": -1, "d": 0}) == (2, 1)


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    found = [
        bootstrap_interval(rng.normal(1, 2, 40), seed=seed, n_resamples=200) for seed in range(150)
    ]
    assert 0.90 < np.mean([low <= 1 <= high for low, high in found]) < 0.98
    assert bootstrap_interval(np.full(3, 0.5), seed=0) == (0.5, 0.5)
