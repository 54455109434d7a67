"""Selection: which components to freeze, at an exact budget."""

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from eigenlens.frozen_set import FrozenSet
from eigenlens.scoring.scores import Scores

Within = Literal["all", "matrix", "layer"]


def select(
    scores: Scores,
    fraction: float | None = None,
    *,
    count: int | None = None,
    within: Within | str = "all",
    negative_only: bool = False,
) -> FrozenSet:
    """Choose the components with the lowest scores.

    Args:
        scores: what :func:`eigenlens.score` returned.
        fraction: share to freeze, in [0, 1]; ``round(fraction · n)`` components.
        count: number to freeze, instead of a fraction.
        within: budget over ``all`` components together, or the same share (or count) of each
            ``matrix`` kind or ``layer``.
        negative_only: leave out components whose score is not below zero, even if the budget is
            then not used up.

    Raises:
        ValueError: both or neither of ``fraction`` and ``count``; one out of range; NaN scores.
    """
    if (fraction is None) == (count is None):
        raise ValueError("Give either fraction= or count=.")
    if fraction is not None and not 0 <= fraction <= 1:
        raise ValueError(f"fraction={fraction} lies outside [0, 1].")
    if within not in get_args(Within):
        raise ValueError(f"within={within!r}: choose from {', '.join(get_args(Within))}.")
    values = scores.delta_loss
    if np.isnan(values).any():
        raise ValueError("Some scores are NaN; there is no order to select by.")
    chosen = []
    for rows in _groups(scores, within):
        budget = round(fraction * len(rows)) if fraction is not None else int(count or 0)
        if not 0 <= budget <= len(rows):
            raise ValueError(
                f"count={count} lies outside 0 … {len(rows)}, the number to choose from."
            )
        lowest = rows[np.argsort(values[rows], kind="stable")[:budget]]
        chosen.append(lowest[values[lowest] < 0] if negative_only else lowest)
    return FrozenSet.from_scores(scores, np.sort(np.concatenate(chosen)))


def _groups(scores: Scores, within: str) -> Iterator[np.ndarray]:
    if within == "all":
        yield np.arange(len(scores))
        return
    keys = scores.components[within].to_numpy()
    for key in dict.fromkeys(keys):
        yield np.flatnonzero(keys == key)
