"""Estimates that take more passes than one scoring run.

``first_order``, ``fisher``, ``position_fisher`` and ``margin`` come out of one run
(:mod:`eigenlens.scoring.estimators`). Here:

- ``integrated``: the gradient by every strength, averaged along the joint path on which all
  components are frozen together. Complete: the estimates add up to
  ``L(all frozen) − L(none frozen)``. ``m`` forward and ``m`` backward passes; its error is that of
  a midpoint rule with m nodes. It answers another question than the effect of one component alone.
- ``refined``: exact effects for the components whose second-order term is largest, since there
  a derivative misleads, wherever they refute the estimate. One forward pass (from the component's
  layer on) for each refined component; the error there is that of the choice of examples.

A Hessian-vector correction of single components is left out: it costs a backward pass through a
backward pass for each, more than the exact effect, which needs one forward pass.
"""

from dataclasses import replace

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
from eigenlens.scoring.estimators import first_order, fisher
from eigenlens.tasks.batches import make_batches

# What `eigenlens run` does where it freezes by one ranking.
REFINED = 300
REFINED_EXAMPLES = 50
_REFUTED = 2.0  # standard errors


def integrated(
    model: TransformerBridge,
    base: Scores,
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
        base: its scores: components, directions and means.
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
    total = np.zeros(len(base))
    with Gates(model, base) as gates:
        for node in tqdm(range(steps), desc="integrated", disable=not progress):
            gates.z = torch.full_like(gates.z, (node + 0.5) / steps)
            for batch in batches:
                total += gates.gradient(batch, metric)[1].double().cpu().numpy()
    return with_estimate(base, "integrated", total / (steps * len(data)))


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
    """Exact effects where they refute an estimate, estimates elsewhere.

    Measured are the components whose second-order term ``½ mean_b e_b²`` is largest (or, without
    effects of single examples, the estimate itself). An estimate gives way to the exact effect on
    ``data`` if it is more than two standard errors off: a small sample is no better judge.

    Args:
        model: in eval mode, unedited.
        scores: the estimates.
        data: examples to measure on.
        count: components to measure exactly; all where there are not as many.
        metric: a number per example; the loss in nats by default.
        batch_size: examples per pass.
        progress: show a progress bar.

    Returns:
        The scores with ``criterion="refined"``.

    Raises:
        ValueError: a negative ``count``; scores without directions.
    """
    if count < 0:
        raise ValueError(f"count={count} is negative.")
    values = scores.delta_loss.copy()
    rows = np.argsort(-_doubt(scores), kind="stable")[:count]
    if count:
        effects = exact_effects(
            model, scores, rows, data, metric=metric, batch_size=batch_size, progress=progress
        )
        refuted = np.abs(effects.mean(1) - values[rows]) > _REFUTED * _standard_error(effects)
        values[rows[refuted]] = effects.mean(1)[refuted]
    return with_estimate(scores, "refined", values)


def _standard_error(effects: Float[np.ndarray, "component example"]) -> np.ndarray:
    n = effects.shape[1]
    return effects.std(1, ddof=1) / np.sqrt(n) if n > 1 else np.zeros(len(effects))


def _doubt(scores: Scores) -> np.ndarray:
    """How far an estimate may be off: its second-order term, or else its size."""
    second_order = fisher(scores.components, scores.n_examples) - first_order(scores.components)
    return np.abs(scores.delta_loss) if np.isnan(second_order).all() else second_order


def with_estimate(scores: Scores, name: str, values: np.ndarray) -> Scores:
    """The same components ranked by an estimate made elsewhere."""
    return replace(scores, components=scores.components.assign(estimate=values), criterion=name)
