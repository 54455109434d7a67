"""Estimates of the effect of freezing a component, from the sums of one scoring pass.

``first_order`` is the derivative of the metric along the strength of a freeze: one forward and one
backward pass. Its error is of second order in the effect, and for the largest effects as large as
they are: of the top 0.1 % on SmolLM2's addition half of the signs are wrong.

``fisher`` adds the curvature that the empirical Fisher information gives:

    ``ΔL_i ≈ mean_b e_b + ½ mean_b e_b²``  with  ``e_b = Σ_t (ā_t − a_bt) g_bt``

which is the second-order term where the Hessian of a negative log-likelihood is replaced by the
mean outer product of per-example gradients. It costs nothing beyond per-example effects (a forward
pass for the means, then a forward and a backward pass) and penalises components with large effects
of either sign, where the derivative misleads most. It applies to log-likelihoods in nats,
and only near a minimum of the loss: where an answer is wrong, its gradient is large and the loss is
straight, and the squared effect is no curvature.

``position_fisher`` squares the effects of single positions, ``½ mean_b Σ_t e_bt²``: the Fisher
information of positions that are taken for independent. Same passes, and where it was measured the
same errors.

``margin`` (:func:`eigenlens.scoring.accumulators.margin_effect`) lets freezing move the log-odds of
each answer linearly and takes the exact log-loss of that. Same passes as ``fisher``. Right for
wrong answers, where the loss is straight; as wrong as ``first_order`` where log-odds do not move
linearly, as under massive activations.

Measured errors of all: ``eigenlens experiment estimators``.
"""

import numpy as np
import pandas as pd


def first_order(components: pd.DataFrame) -> np.ndarray:
    """``mean_b e_b``."""
    return components["effect"].to_numpy()


def fisher(components: pd.DataFrame, n_examples: int) -> np.ndarray:
    """``mean_b e_b + ½ mean_b e_b²``; NaN where per-example effects were not computed."""
    mean, std = components["effect"], components["std"]
    square = mean**2 + std**2 * (n_examples - 1) / n_examples
    return (mean + square / 2).to_numpy()


def position_fisher(components: pd.DataFrame) -> np.ndarray:
    """``mean_b e_b + ½ mean_b Σ_t e_bt²``; NaN where single effects were not computed."""
    return (components["effect"] + components["position_square"] / 2).to_numpy()
