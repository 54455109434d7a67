"""Random components, matched to a selection: does it matter which components are frozen?

Matched *by number*, each matrix loses as many components as in the selection. Matched *by energy*,
each matrix loses components whose Σ (z σ)² comes as close to the selection's as adding further
ones allows: what is missing is less than any component left out would add.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from eigenlens.baselines.baseline import Baseline, Search
from eigenlens.baselines.edits import FrozenEdit
from eigenlens.baselines.ranked import OneShot, train_scores
from eigenlens.frozen_set import FrozenSet
from eigenlens.scoring import Scores

Match = Literal["count", "energy"]


@dataclass(frozen=True)
class RandomComponents(Baseline):
    """Freezes random components, matched to each of several selections.

    Attributes:
        match: what each matrix has in common with the selection: the ``count`` of components, or
            their spectral ``energy``.
        like: the selections; those of one-shot eigenpruning if none are given.
    """

    match: Match | str = "count"
    like: tuple[FrozenSet, ...] = ()

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise ValueError(f"match={self.match!r}: choose from {', '.join(get_args(Match))}.")

    @property
    def name(self) -> str:
        """With what is matched."""
        return f"random, matched by {self.match}"

    def find(self, search: Search) -> None:
        """One draw per selection."""
        like = self.like or tuple(OneShot().sets(search).values())
        scores = train_scores(search)
        rng = np.random.default_rng(search.seed)
        for frozen in like:
            drawn = matched(scores, frozen, self.match, rng)
            search.consider(FrozenEdit(drawn), like=len(frozen), components=len(drawn))


def matched(
    scores: Scores, frozen: FrozenSet, match: Match | str, rng: np.random.Generator
) -> FrozenSet:
    """Random components of ``scores``, matched to ``frozen`` matrix by matrix.

    Strengths are those of ``frozen``, in random order; means are by position, or one for all, as
    in ``frozen``.
    """
    draw = _DRAWS[match]
    table = scores.components
    keys = ["layer", "matrix"]
    rows_of = table.groupby(keys).indices
    sigma = frozen.components.merge(table, how="left", on=[*keys, "head", "index"])["sigma"]
    chosen: list[np.ndarray] = []
    strengths: list[np.ndarray] = []
    for key, mine in frozen.components.groupby(keys, sort=False).indices.items():
        strength = frozen.components["strength"].to_numpy()[mine]
        energy = (strength * sigma.to_numpy()[mine]) ** 2
        order = rng.permutation(rows_of[key])
        given = rng.permutation(np.resize(strength, len(order)))
        given[: len(strength)] = rng.permutation(strength)
        taken = draw((given * table["sigma"].to_numpy()[order]) ** 2, energy)
        chosen.append(order[taken])
        strengths.append(given[taken])
    if not chosen:
        return FrozenSet.from_scores(scores, np.array([], dtype=int))
    rows = np.concatenate(chosen)
    by_row = np.argsort(rows)
    drawn = FrozenSet.from_scores(scores, rows[by_row], np.concatenate(strengths)[by_row])
    return drawn.shared() if frozen.means.is_shared else drawn


def _by_count(candidates: np.ndarray, energy: np.ndarray) -> np.ndarray:
    return np.arange(len(energy))


def _by_energy(candidates: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """In the given order, every candidate that still fits the budget."""
    left = energy.sum() * (1 + 1e-9)
    taken = []
    for row, price in enumerate(candidates):
        if price <= left:
            left -= price
            taken.append(row)
    return np.array(taken, dtype=int)


_DRAWS = {"count": _by_count, "energy": _by_energy}
