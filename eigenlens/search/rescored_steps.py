"""Freeze a few components, score the others again under what is frozen, and so on."""

import os
from typing import Any

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import Evaluation, evaluate
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.scoring import Scores
from eigenlens.search.ranking import harmful, scores_under, step_size
from eigenlens.search.result import Checkpoint, SearchResult, best_step, trace_row


def iterative(
    model: TransformerBridge,
    base: Scores,
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
    are those of ``base`` and stay fixed. A step costs a forward and a backward pass over ``train``,
    and a look at validation.

    Args:
        model: in eval mode.
        base: scores of the unedited model; their criterion ranks in every step (``fisher``, where
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
    size = step_size(step, len(base))
    kept = Checkpoint(
        checkpoint,
        base,
        {"train": train, "validation": validation},
        {"method": "iterative", "size": size, "batch_size": batch_size},
    )

    def look(rows: np.ndarray) -> Evaluation:
        with freeze(model, FrozenSet.from_scores(base, rows)):
            return evaluate(model, validation, batch_size=batch_size, choices=False)

    rows = np.array([], dtype=int)
    trace: list[dict[str, Any]] = [trace_row(0, 0, look(rows))]
    if (saved := kept.load()) is not None:
        rows, trace = saved[0]["rows"].numpy(), saved[1]["trace"]
    bar = tqdm(range(len(trace), steps + 1), desc="iterative", disable=not progress)
    for number in bar:
        scores = scores_under(model, base, rows, train, batch_size)
        lowest = harmful(scores, rows)[:size]
        if not len(lowest):
            break
        rows = np.concatenate([rows, lowest])  # in the order of freezing
        found = look(rows)
        trace.append(trace_row(number, len(rows), found))
        kept.save({"rows": rows}, {"trace": trace})
        bar.set_postfix(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.1%}")
    table = best_step(trace)
    count = int(table.loc[table["chosen"], "components"].iloc[0])
    return SearchResult("iterative", FrozenSet.from_scores(base, np.sort(rows[:count])), table)
