"""Searching for what to freeze beyond one ranking.

``iterative`` freezes a few components at a time and scores the others again under what is frozen
already, since joint effects are not sums. ``learned`` trains a gate z ∈ [0, 1] per component, from
z = 0 (unedited) with the model's weights fixed: the gradient of the loss by gate i is the
first-order score of component i under the current gates, so a step costs a scoring pass and an
optimiser step on one vector. Gates between 0 and 1 *attenuate*; rounding them *freezes*.

Means are those of the unedited model and stay fixed. Stopping points are chosen on validation data.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import Evaluation, evaluate
from eigenlens.freezing import FrozenSet, freeze
from eigenlens.scoring import Criterion, Scores, score
from eigenlens.scoring.scorer import mean_effects
from eigenlens.spectra import Spectra

_OFF = 1e-3  # a gate below this is left out: its component is not edited


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        frozen: the best set on validation.
        trace: one row per step: components edited, train loss where known, validation loss and
            accuracy.
    """

    frozen: FrozenSet
    trace: pd.DataFrame

    def _repr_html_(self) -> str:
        return self.frozen._repr_html_() + self.trace.to_html(index=False)


def better(one: Evaluation, two: Evaluation) -> bool:
    """Whether ``one`` is the better of two validation results: accuracy, then loss."""
    return (one.accuracy, -one.loss) > (two.accuracy, -two.loss)


def iterative(
    model: TransformerBridge,
    spectra: Spectra,
    train: Dataset,
    validation: Dataset,
    *,
    step: int,
    steps: int = 20,
    criterion: Criterion = "margin",
    batch_size: int = 50,
    progress: bool = True,
) -> SearchResult:
    """Freeze the ``step`` lowest components, score again, and so on; the best on validation wins.

    Stops early where no component has a negative score.

    Args:
        model: in eval mode.
        spectra: its decomposition.
        train: examples to score on.
        validation: examples to choose the stopping point on.
        step: components per step.
        steps: most steps.
        criterion: what ranks components.
        batch_size: examples per pass.
        progress: show a progress bar with validation loss and accuracy.
    """
    base = score(model, spectra, train, criterion=criterion, batch_size=batch_size, progress=False)
    scores, rows = base, np.array([], dtype=int)
    best_result = evaluate(model, validation, batch_size=batch_size)
    best, trace = FrozenSet.from_scores(base, rows), [_row(0, best_result)]
    bar = tqdm(range(steps), desc="iterative", disable=not progress)
    for _ in bar:
        values = scores.delta_loss.copy()
        values[rows] = np.inf
        lowest = np.argsort(values, kind="stable")[:step]
        lowest = lowest[values[lowest] < 0]
        if not len(lowest):
            break
        rows = np.sort(np.concatenate([rows, lowest]))
        frozen = FrozenSet.from_scores(base, rows)
        with freeze(model, frozen):
            found = evaluate(model, validation, batch_size=batch_size)
            scores = score(
                model,
                spectra,
                train,
                criterion=criterion,
                batch_size=batch_size,
                progress=False,
            )
        trace.append(_row(len(rows), found))
        bar.set_postfix(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.1%}")
        if better(found, best_result):
            best, best_result = frozen, found
    return SearchResult(best, pd.DataFrame(trace))


def learned(
    model: TransformerBridge,
    spectra: Spectra,
    train: Dataset,
    validation: Dataset,
    *,
    steps: int = 60,
    lr: float = 0.03,
    sparsity: float = 0.0,
    hard: bool = False,
    batch_size: int = 50,
    every: int = 5,
    progress: bool = True,
) -> SearchResult:
    """Train a gate per component by Adam, from 0, on the mean loss over ``train``.

    Args:
        model: in eval mode.
        spectra: its decomposition.
        train: examples to train the gates on, all of them in every step.
        validation: examples to choose the stopping point on.
        steps: optimiser steps.
        lr: learning rate of the gates.
        sparsity: nats per unit of summed gates. With ``hard`` the price of z is ``z`` plus
            ``z (1 − z)``, the latter growing over the steps, which drives gates to 0 or 1.
        hard: return gates rounded at ½ (frozen); else the gates as they are (attenuated).
        batch_size: examples per pass.
        every: steps between two looks at the validation data.
        progress: show a progress bar with validation loss and accuracy.
    """
    base = score(model, spectra, train, batch_size=batch_size, progress=False)
    gates = torch.zeros(len(base), dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([gates], lr)
    nothing = FrozenSet.from_scores(base, np.array([], dtype=int))
    best, best_result = nothing, evaluate(model, validation, batch_size=batch_size)
    trace = [_row(0, best_result)]
    bar = tqdm(range(1, steps + 1), desc="learned", disable=not progress)
    for step in bar:
        with freeze(model, gated(base, gates)):
            effects = mean_effects(model, spectra, train, base, batch_size=batch_size)
        gates.grad = torch.tensor(effects) + _price(gates, sparsity, step / steps, hard)
        adam.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
        if step % every and step != steps:
            continue
        frozen = gated(base, (gates > 0.5).double() if hard else gates)
        with freeze(model, frozen):
            found = evaluate(model, validation, batch_size=batch_size)
        trace.append(_row(len(frozen), found))
        bar.set_postfix(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.1%}")
        if better(found, best_result):
            best, best_result = frozen, found
    return SearchResult(best, pd.DataFrame(trace))


def gated(base: Scores, gates: Float[Tensor, " component"]) -> FrozenSet:
    """The components whose gate is open, with their strengths."""
    strength = gates.detach().numpy()
    rows = np.flatnonzero(strength > _OFF)
    return FrozenSet.from_scores(base, rows, strength[rows])


def _price(
    gates: Float[Tensor, " component"], sparsity: float, progress: float, hard: bool
) -> Float[Tensor, " component"]:
    """Gradient of the sparsity pressure by the gates."""
    pressure = torch.full_like(gates, sparsity)
    if hard:
        pressure += sparsity * 4 * progress * (1 - 2 * gates.detach())
    return pressure


def _row(components: int, found: Evaluation) -> dict[str, Any]:
    return {"components": components, "loss": found.loss, "accuracy": found.accuracy}
