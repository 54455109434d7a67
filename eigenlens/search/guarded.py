"""Freeze step by step, and keep a step only if the loss on held-out examples falls."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import Evaluation, evaluate
from eigenlens.freezing import FrozenSet, freeze
from eigenlens.scoring import Scores
from eigenlens.search.protection import Protection
from eigenlens.search.ranking import harmful, scores_under, step_size
from eigenlens.search.result import Checkpoint, SearchResult, best_step, trace_row

Look = Callable[[np.ndarray], tuple[Evaluation, bool]]
_TRIALS = 16  # trial sets per step before the search gives up


class _Step(NamedTuple):
    """What a step came to: rows accepted, rows set aside, the calibration loss, sets tried."""

    accepted: np.ndarray
    blamed: np.ndarray
    loss: float
    trials: int


def guarded(
    model: TransformerBridge,
    base: Scores,
    train: Dataset,
    validation: Dataset,
    *,
    step: int | float = 0.01,
    steps: int = 30,
    calibration: float = 0.25,
    protect: Protection | None = None,
    batch_size: int = 50,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Re-scored freezing where every step is checked before it is kept.

    A share of ``train`` is held out as calibration examples; the others are scored. A step freezes
    the lowest scores that are below zero. If the calibration loss does not fall, the set is halved,
    again and again; the half that was cut off last is blamed and set aside for good. A step that
    was kept whole makes the next one twice as large. The search ends when nothing is below zero or
    a step finds nothing to keep, so the calibration loss never rises. Of the steps kept, the best
    on validation is returned.

    A step costs a scoring pass and as many looks at the calibration examples as sets were tried.

    Args:
        model: in eval mode.
        base: scores of the unedited model; their criterion ranks (``margin``, where it is an
            estimate made elsewhere), their means replace.
        train: examples to score and calibrate on.
        validation: examples to choose the stopping point on.
        step: components of the first step: a number, or a share of all.
        steps: most steps.
        calibration: share of ``train`` to hold out.
        protect: a step must also stay within its bound.
        batch_size: examples per pass.
        seed: of the choice of calibration examples.
        checkpoint: file that keeps the state after every step; a killed search goes on from it.
        progress: show a progress bar with validation loss and accuracy.

    Raises:
        ValueError: a step or share out of range; scores without directions; a checkpoint of
            another search.
    """
    size = step_size(step, len(base))
    fit, held_out = _hold_out(train, calibration, seed)
    spared = protect.data if protect else {}
    kept = Checkpoint(
        checkpoint,
        base,
        {"train": train, "validation": validation, **spared},
        {
            "method": "guarded",
            "size": size,
            "calibration": calibration,
            "bound": protect.bound if protect else None,
            "batch_size": batch_size,
            "seed": seed,
        },
    )

    def look(rows: np.ndarray, data: Dataset) -> tuple[Evaluation, bool]:
        with freeze(model, FrozenSet.from_scores(base, np.sort(rows))):
            found = evaluate(model, data, batch_size=batch_size, choices=False)
            return found, protect is None or protect.holds(protect.measure())

    def look_at_more(rows: np.ndarray, more: np.ndarray) -> tuple[Evaluation, bool]:
        return look(np.append(rows, more), held_out)

    rows = aside = np.array([], dtype=int)
    found, _ = look(rows, validation)
    loss = look(rows, held_out)[0].loss
    trace: list[dict[str, Any]] = [trace_row(0, 0, found, calibration_loss=loss, tried=0, aside=0)]
    ended = False
    if (saved := kept.load()) is not None:
        rows, aside = saved[0]["rows"].numpy(), saved[0]["aside"].numpy()
        trace, size, ended = saved[1]["trace"], saved[1]["size"], saved[1]["ended"]
        loss = trace[-1]["calibration_loss"]
    bar = tqdm(range(len(trace), steps + 1), desc="guarded", disable=not progress)
    for number in bar:
        if ended:
            break
        scores = scores_under(model, base, rows, fit, batch_size)
        candidates = harmful(scores, np.concatenate([rows, aside]))
        made = _try(candidates, size, loss, partial(look_at_more, rows))
        whole = len(made.accepted) == min(size, len(candidates))
        rows, aside = np.append(rows, made.accepted), np.append(aside, made.blamed)
        loss, ended = made.loss, not len(made.accepted)
        size = 2 * size if whole else max(1, len(made.accepted))
        found, _ = look(rows, validation)
        more = {"calibration_loss": loss, "tried": made.trials, "aside": len(aside)}
        trace.append(trace_row(number, len(rows), found, **more))
        kept.save({"rows": rows, "aside": aside}, {"trace": trace, "size": size, "ended": ended})
        bar.set_postfix(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.1%}")
    table = best_step(trace)
    count = int(table.loc[table["chosen"], "components"].iloc[0])
    frozen = FrozenSet.from_scores(base, np.sort(rows[:count]))
    return SearchResult("guarded", frozen, table, *([protect.table(frozen)] if protect else []))


def _hold_out(train: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Examples to score, and examples to calibrate on."""
    n = round(share * len(train))
    if not 1 <= n < len(train):
        raise ValueError(
            f"calibration={share} of {len(train)} examples leaves nothing on one side."
        )
    order = np.random.default_rng(seed).permutation(len(train))
    return train.select(np.sort(order[n:])), train.select(np.sort(order[:n]))


def _try(candidates: np.ndarray, size: int, loss: float, look: Look) -> _Step:
    """Halve the lowest ``size`` candidates until freezing them lowers the calibration loss.

    Where even the lowest one alone does not, it is set aside and a quarter as many of the next are
    tried, under the same scores.
    """
    blamed: list[np.ndarray] = []
    trials = 0
    while len(candidates) and trials < _TRIALS:
        trial = candidates[:size]
        cut = trial[:0]
        while len(trial) and trials < _TRIALS:
            trials += 1
            found, spared = look(trial)
            if spared and found.loss < loss:
                return _Step(trial, np.concatenate([*blamed, cut]), found.loss, trials)
            cut = trial[len(trial) // 2 :]
            trial = trial[: len(trial) // 2]
        blamed.append(cut)
        candidates = candidates[1:]
        size = max(1, size // 4)
    return _Step(candidates[:0], np.concatenate([candidates[:0], *blamed]), loss, trials)
