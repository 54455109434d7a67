"""What ``iterative`` and ``guarded`` share: scores under an edit, and who comes next."""

import numpy as np
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.scoring import CRITERIA, Scores, score


def scores_under(
    model: TransformerBridge, scores: Scores, rows: np.ndarray, data: Dataset, batch_size: int
) -> Scores:
    """Scores of all components on ``data`` while ``rows`` of ``scores`` are frozen.

    What freezing puts in place are the means of ``scores``, not those of the edited model, so the
    scores are derivatives of what the search does. One forward and one backward pass.
    """
    # An estimate made elsewhere cannot be made again in every step.
    criterion = scores.criterion if scores.criterion in CRITERIA else "fisher"
    with freeze(model, FrozenSet.from_scores(scores, rows)):
        found = score(
            model,
            scores.spectra_on(model),
            data,
            criterion=criterion,
            reference=scores.reference,
            means=scores,
            batch_size=batch_size,
            progress=False,
        )
    return found.with_criterion(criterion, scores.z)


def harmful(scores: Scores, taken: np.ndarray) -> np.ndarray:
    """Rows with a score below zero, the lowest first, without those ``taken``."""
    values = scores.delta_loss.copy()
    values[taken] = np.inf
    order = np.argsort(values, kind="stable")
    return order[values[order] < 0]


def step_size(step: int | float, n_components: int) -> int:
    """Components per step from a number or a share.

    Raises:
        ValueError: not a number of components from 1 to all, nor a share in (0, 1).
    """
    size = step if isinstance(step, int) else round(step * n_components)
    if not 1 <= size <= n_components:
        raise ValueError(
            f"step={step} of {n_components} components: give a number from 1 to {n_components}, "
            "or a share between 0 and 1 that is at least one component."
        )
    return size
