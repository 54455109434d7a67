"""Freeze by one ranking; validation data choose how much."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import numpy as np
from datasets import Dataset
from pydantic import Field
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.provenance import keeping_weights
from eigenlens.scoring import Scores
from eigenlens.search.result import SearchResult, best_step, look, trace_row
from eigenlens.selection import Within, select

Share = Annotated[float, Field(ge=0, le=1)]


@keeping_weights
def one_shot(
    model: TransformerBridge,
    scores: Scores,
    validation: Dataset,
    *,
    fractions: Sequence[Share] = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
    within: Within = "all",
    negative_only: bool = False,
    choose: Callable[[Scores, float], FrozenSet] | None = None,
    or_nothing: bool = True,
    batch_size: int = 50,
) -> SearchResult:
    """Freeze the lowest scores; of several fractions, the best on validation (fewest on a tie).

    Args:
        model: in eval mode.
        scores: its scores.
        validation: examples to choose the fraction on.
        fractions: shares of the components to try, each in [0, 1].
        within: budget over all components, or the same share of each matrix kind or layer.
        negative_only: leave out components whose score is not below zero.
        choose: selects a share in a way of its own; ``within`` and ``negative_only`` are then idle.
        or_nothing: also consider freezing nothing, which a ranking that does not help should lose
            to.
        batch_size: examples per pass.

    Raises:
        ValueError: no fraction, or one out of range.
    """
    if not fractions:
        raise ValueError("Give at least one fraction.")
    scores = scores.on(model)
    choose = choose or partial(select, within=within, negative_only=negative_only)
    sets = {0.0: FrozenSet.from_scores(scores, np.array([], dtype=int))} if or_nothing else {}
    sets |= {fraction: choose(scores, fraction) for fraction in sorted(fractions)}
    trace: list[dict[str, Any]] = []
    for fraction, frozen in sets.items():
        with freeze(model, frozen):
            found = look(model, validation, batch_size)
        trace.append(trace_row(len(trace), len(frozen), found, fraction=fraction))
    table = best_step(trace)
    return SearchResult("one_shot", list(sets.values())[int(table["chosen"].argmax())], table)
