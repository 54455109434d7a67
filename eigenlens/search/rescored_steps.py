"""Freeze a few components, score the others again under what is frozen, and so on."""

import os
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.provenance import keeping_weights
from eigenlens.scoring import Scores
from eigenlens.search.ranking import harmful, scores_under, step_size
from eigenlens.search.result import Checkpoint, SearchResult, best_step, look, trace_row


@keeping_weights
def iterative(
    model: TransformerBridge,
    scores: Scores,
    train: Dataset,
    validation: Dataset,
    *,
    step: int | float = 0.01,
    steps: int = 20,
    batch_size: int = 50,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Freeze the ``step`` lowest components, score again, and so on; the best on validation wins.

    Every step is accepted; the search stops early where no component has a negative score. Means
    are those of ``scores`` and stay fixed. A step costs a forward and a backward pass over
    ``train``, and a look at validation.

    Args:
        model: in eval mode.
        scores: of the unedited model; their criterion ranks in every step (``fisher``, where
            it is an estimate made elsewhere), their means replace.
        train: examples to score on.
        validation: examples to choose the stopping point on.
        step: components per step: a number, or a share of all.
        steps: most steps.
        batch_size: examples per pass.
        checkpoint: file that keeps the state after every step; a killed search goes on from it.
        progress: show a progress bar with validation loss and accuracy.

    Raises:
        ValueError: a step out of range; scores without directions; a checkpoint of another search.
    """
    scores = scores.on(model)
    size = step_size(step, len(scores))
    options = {"method": "iterative", "size": size, "batch_size": batch_size}
    kept = Checkpoint(checkpoint, scores, train, validation, options)
    rows = np.array([], dtype=int)
    trace: list[dict[str, Any]] = [trace_row(0, 0, look(model, validation, batch_size))]
    if (saved := kept.load()) is not None:
        rows, trace = saved[0]["rows"].numpy(), saved[1]["trace"]
    bar = tqdm(range(len(trace), steps + 1), desc="iterative", disable=not progress)
    for number in bar:
        lowest = harmful(scores_under(model, scores, rows, train, batch_size), rows)[:size]
        if not len(lowest):
            break
        rows = np.concatenate([rows, lowest])  # in the order of freezing
        with freeze(model, FrozenSet.from_scores(scores, rows)):
            found = look(model, validation, batch_size)
        trace.append(trace_row(number, len(rows), found))
        kept.save({"rows": rows}, {"trace": trace})
        bar.set_postfix(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.1%}")
    table = best_step(trace)
    count = int(table.loc[table["chosen"], "components"].iloc[0])
    return SearchResult("iterative", FrozenSet.from_scores(scores, np.sort(rows[:count])), table)
