"""Freeze step by step, and keep a step only if the loss on held-out examples falls."""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from pydantic import BaseModel, ConfigDict, Field
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.freezing import Freeze, freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.provenance import keeping_weights
from eigenlens.scoring import Scores
from eigenlens.search.protection import Protection
from eigenlens.search.ranking import harmful, scores_under, step_size
from eigenlens.search.result import Checkpoint, SearchResult, best_step, look, trace_row

# The loss with these components frozen, or None where it is no lower or a bound is broken.
Check = Callable[[np.ndarray, float], float | None]
_TRIALS = 32  # sets tried per step; a descent from 10,000 components to one takes 15


class _Step(NamedTuple):
    """What a step came to: rows accepted, rows set aside, the calibration loss, sets tried."""

    accepted: np.ndarray
    blamed: np.ndarray
    loss: float
    trials: int


class GuardedConfig(BaseModel):
    """Options of :func:`guarded`; what is out of range is refused.

    Attributes:
        step: components of the first step: a number, or a share of all.
        steps: most steps.
        calibration: share of ``train`` to hold out.
        batch_size: examples per pass.
        seed: of the choice of calibration examples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int | float = 0.01
    steps: int = Field(default=30, ge=0)
    calibration: float = Field(default=0.25, gt=0, lt=1)
    batch_size: int = Field(default=50, ge=1)
    seed: int = 0


@keeping_weights
def guarded(
    model: TransformerBridge,
    scores: Scores,
    train: Dataset,
    validation: Dataset,
    config: GuardedConfig | None = None,
    *,
    protect: Protection | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Re-scored freezing where every step is checked before it is kept.

    A share of ``train`` is held out as calibration examples; the others are scored. A step freezes
    the lowest scores that are below zero. If the calibration loss does not fall, the set is halved
    and each half is tried, again and again; a single component that does not help is blamed and
    set aside for good. A step that was kept whole makes the next one twice as large. The search
    ends when nothing is below zero, or nothing that is helps. So the calibration loss never rises.
    Of the steps kept, the best on validation is returned.

    A step costs a forward and a backward pass over the scored examples (none where the step before
    accepted nothing), and as many looks at the calibration examples as sets were tried (32 at
    most).

    Args:
        model: in eval mode.
        scores: of the unedited model; their criterion ranks (``fisher``, where it is an estimate
            made elsewhere), their means replace.
        train: examples to score and calibrate on.
        validation: examples to choose the stopping point on.
        config: options.
        protect: a step must also stay within its bound.
        checkpoint: file that keeps the state after every step; a killed search goes on from it.
        progress: show a progress bar with validation loss and accuracy.

    Raises:
        ValueError: a step or share out of range; scores without directions; a checkpoint of
            another search.
    """
    config = config or GuardedConfig()
    scores = scores.on(model)
    size = step_size(config.step, len(scores))
    fit, held_out = _hold_out(train, config.calibration, config.seed)
    options = {"method": "guarded", **config.model_dump(exclude={"step", "steps"}), "size": size}
    kept = Checkpoint(checkpoint, scores, train, validation, options, protect)

    def under(rows: np.ndarray) -> Freeze:
        return freeze(model, FrozenSet.from_scores(scores, np.sort(rows)))

    def check(rows: np.ndarray, loss: float) -> float | None:
        with under(rows):
            found = look(model, held_out, config.batch_size).loss
            helps = found < loss and (protect is None or protect.holds(protect.measure()))
            return found if helps else None

    rows = aside = np.array([], dtype=int)
    ended, ranked = False, None
    if (saved := kept.load()) is not None:
        rows, aside = saved[0]["rows"].numpy(), saved[0]["aside"].numpy()
        trace, size, ended = saved[1]["trace"], saved[1]["size"], saved[1]["ended"]
        loss = trace[-1]["calibration_loss"]
        with under(rows):
            found = look(model, validation, config.batch_size)
    else:
        loss = look(model, held_out, config.batch_size).loss
        found = look(model, validation, config.batch_size)
        trace = [trace_row(0, 0, found, calibration_loss=loss, tried=0, aside=0)]
    bar = tqdm(range(len(trace), config.steps + 1), desc="guarded", disable=not progress)
    for number in bar:
        if ended:
            break
        if ranked is None:
            ranked = scores_under(model, scores, rows, fit, config.batch_size)
        candidates = harmful(ranked, np.concatenate([rows, aside]))
        made = _try(rows, candidates, size, loss, check)
        whole = len(made.accepted) == min(size, len(candidates))
        rows, aside = np.append(rows, made.accepted), np.append(aside, made.blamed)
        loss = made.loss
        ended = not len(made.accepted) and made.trials < _TRIALS
        size = 2 * size if whole else max(1, len(made.accepted))
        if len(made.accepted):
            ranked = None
            with under(rows):
                found = look(model, validation, config.batch_size)
        more = {"calibration_loss": loss, "tried": made.trials, "aside": len(aside)}
        trace.append(trace_row(number, len(rows), found, **more))
        state = {"trace": trace, "size": size, "ended": ended}
        kept.save({"rows": rows, "aside": aside}, state)
        bar.set_postfix(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.1%}")
    table = best_step(trace)
    count = int(table.loc[table["chosen"], "components"].iloc[0])
    frozen = FrozenSet.from_scores(scores, np.sort(rows[:count]))
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


def _try(rows: np.ndarray, candidates: np.ndarray, size: int, loss: float, check: Check) -> _Step:
    """Keep blocks of the lowest ``size`` candidates that lower the loss, and halve the others.

    Blocks are tried lowest first, each on top of ``rows`` and what was kept before. Where nothing
    of the first ``size`` helps, the next ones are tried. What was neither kept nor blamed when
    trials run out is left to later steps.
    """
    kept, blamed = candidates[:0], candidates[:0]
    trials = 0
    for start in range(0, len(candidates), size):
        waiting = [candidates[start : start + size]]
        while waiting and trials < _TRIALS:
            block = waiting.pop()
            trials += 1
            found = check(np.concatenate([rows, kept, block]), loss)
            if found is not None:
                kept, loss = np.append(kept, block), found
            elif len(block) == 1:
                blamed = np.append(blamed, block)
            else:
                half = len(block) // 2
                waiting += [block[half:], block[:half]]
        if len(kept) or trials == _TRIALS:
            break
    return _Step(kept, blamed, loss, trials)
