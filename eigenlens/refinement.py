"""Estimates that take more passes than one scoring run.

``first_order``, ``fisher``, ``position_fisher`` and ``margin`` come out of one run
(:mod:`eigenlens.scoring.criteria`). Here:

- ``integrated``: the gradient by every strength, averaged along the joint path on which all
  components are frozen together. Complete: the estimates add up to
  ``L(all frozen) − L(none frozen)``. ``m`` forward and ``m`` backward passes; its error is that of
  a midpoint rule with m nodes. It answers another question than the effect of one component alone.
- ``refined``: exact effects on some examples for the components whose second-order term is
  largest, since there a derivative misleads, with the estimate as a control variate. One forward
  pass of these examples (from the component's layer on) for each refined component, and one
  forward and one backward pass for all together; the error there is that of the choice of examples,
  as far as the estimate does not explain it.

A Hessian-vector correction of single components is left out: it costs a backward pass through a
backward pass for each, more than the exact effect, which needs one forward pass.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.exact import exact_effects
from eigenlens.gates import Gates
from eigenlens.metrics import Metric, answer_loss
from eigenlens.scoring import Scores
from eigenlens.scoring.criteria import first_order, fisher
from eigenlens.scoring.scores import estimates_mean
from eigenlens.scoring.single_effects import single_effects
from eigenlens.tasks.batches import make_batches

# What `eigenlens run` does where it freezes by one ranking.
REFINED = 600
REFINED_EXAMPLES = 50


def integrated(
    model: TransformerBridge,
    scores: Scores,
    data: Dataset,
    *,
    steps: int = 16,
    metric: Metric = answer_loss,
    batch_size: int = 50,
    progress: bool = True,
) -> Scores:
    """Integrated gradients along the path that freezes all components together.

    Args:
        model: in eval mode, unedited.
        scores: its scores: components, directions and means.
        data: examples to differentiate on.
        steps: nodes of the midpoint rule.
        metric: a number per example; the loss in nats by default.
        batch_size: examples per pass.
        progress: show a progress bar.

    Returns:
        The scores with ``criterion="integrated"``.

    Raises:
        ValueError: no step; scores without directions.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least 1 is needed.")
    batches = make_batches(data, model, batch_size)
    total = np.zeros(len(scores))
    with Gates(model, scores) as gates:
        for node in tqdm(range(steps), desc="integrated", disable=not progress):
            gates.z = torch.full_like(gates.z, (node + 0.5) / steps)
            for batch in batches:
                total += gates.gradient(batch, metric)[1].cpu().double().numpy()
    return with_estimate(scores, "integrated", total / (steps * len(data)))


def refined(
    model: TransformerBridge,
    scores: Scores,
    data: Dataset,
    *,
    count: int,
    metric: Metric = answer_loss,
    batch_size: int = 50,
    progress: bool = True,
) -> Scores:
    """Exact effects on some examples, corrected by what the estimate says about the others.

    Measured are the components whose second-order term ``½ mean_b e_b²`` is largest (or, without
    effects of single examples, the estimate itself). A small sample alone is a poor judge of a
    mean, but the estimates of single examples tell how far the sample is from typical. With exact
    effects x_b and estimates y_b of the sampled examples and the estimate Y of all of them,

        ``ΔL = mean x_b + β (Y − mean y_b)``,  ``β = cov(x, y) / var(y)`` kept within 0 … 1

    (control variates by regression; Owen, *Monte Carlo theory*, 2013, section 8.9).

    Args:
        model: in eval mode, unedited.
        scores: the estimates.
        data: examples to measure on, of those that ``scores`` are of.
        count: components to measure exactly; all where there are not as many.
        metric: a number per example; the loss in nats by default.
        batch_size: examples per pass.
        progress: show a progress bar.

    Returns:
        The scores with ``criterion="refined"``.

    Raises:
        ValueError: a negative ``count``; scores without directions, or whose criterion or
            reference is not an estimate of the mean effect of freezing.
    """
    if count < 0:
        raise ValueError(f"count={count} is negative.")
    if not estimates_mean(scores.criterion, scores.reference):
        raise ValueError(
            f"criterion={scores.criterion!r} with reference={scores.reference!r} does not estimate "
            "the mean effect of freezing, so exact effects cannot replace it: use 'mean', "
            "'fisher' or 'margin' with the reference 'mean' or 'zero'."
        )
    values = scores.delta_loss.copy()
    rows = np.argsort(-_doubt(scores), kind="stable")[:count]
    if len(rows):
        options: dict[str, Any] = {"metric": metric, "progress": progress}
        exact = exact_effects(model, scores, rows, data, batch_size=batch_size, **options)
        single = single_effects(model, scores, data, rows, batch_size=batch_size, **options)
        estimates, all_ = single.effects, scores.with_criterion("mean").delta_loss
        if not np.isnan(scores.components["margin"]).any():
            estimates, all_ = single.margins, scores.with_criterion("margin").delta_loss
        values[rows] = _regressed(exact, estimates.double().numpy().T, all_[rows])
    return with_estimate(scores, "refined", values)


def _regressed(
    exact: Float[np.ndarray, "component example"],
    estimates: Float[np.ndarray, "component example"],
    all_: Float[np.ndarray, " component"],
) -> Float[np.ndarray, " component"]:
    """Mean exact effect, with the estimates as control variate whose mean ``all_`` is known."""
    away = estimates - estimates.mean(1, keepdims=True)
    spread = (away**2).sum(1)
    slope = (away * exact).sum(1) / np.where(spread > 0, spread, 1)
    slope = np.where(spread > 0, slope.clip(0, 1), 1)  # one example: the difference
    return exact.mean(1) + slope * (all_ - estimates.mean(1))


def _doubt(scores: Scores) -> np.ndarray:
    """How far an estimate may be off: its second-order term, or else its size."""
    second_order = fisher(scores.components, scores.n_examples) - first_order(scores.components)
    return np.abs(scores.delta_loss) if np.isnan(second_order).all() else second_order


def with_estimate(scores: Scores, name: str, values: np.ndarray) -> Scores:
    """The same components ranked by an estimate made elsewhere."""
    return replace(scores, components=scores.components.assign(estimate=values), criterion=name)
