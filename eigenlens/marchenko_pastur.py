"""Where the singular values of noise would end.

The singular values of an ``n × m`` matrix of independent entries with variance ``s²`` fill the
Marchenko–Pastur bulk, which ends at ``s (√n + √m)``. A trained matrix has no known ``s``; it is
estimated from the median singular value, which a few strong directions do not move:
``s = median(σ) / √(max(n, m) μ_β)`` with ``μ_β`` the median of the Marchenko–Pastur law of ratio
``β = min(n, m) / max(n, m)`` (Gavish and Donoho, 2014). Values above the edge stand out from noise
of that strength; where most directions carry structure, the estimate of ``s`` holds it, too.
"""

from functools import lru_cache

import numpy as np
import scipy.integrate
import scipy.optimize


@lru_cache
def median_of_law(beta: float) -> float:
    """Median of the Marchenko–Pastur law of ratio ``beta`` in (0, 1] at unit variance.

    Raises:
        ValueError: a ratio outside (0, 1].
    """
    if not 0 < beta <= 1:
        raise ValueError(f"beta={beta} lies outside (0, 1].")
    low, high = (1 - beta**0.5) ** 2, (1 + beta**0.5) ** 2

    def below(x: float) -> float:
        # x = t² takes the pole at zero out of the density for square matrices.
        def density(t: float) -> float:
            room = max(0.0, (high - t**2) * (t**2 - low))
            return float(np.sqrt(room) / (np.pi * beta * t)) if t > 0 else 0.0

        return float(scipy.integrate.quad(density, low**0.5, x**0.5)[0]) - 0.5

    return float(scipy.optimize.brentq(below, low, high))


def bulk_edge(sigma: np.ndarray, d_in: int, d_out: int) -> np.ndarray:
    """End of the bulk for each row of singular values of a ``d_in × d_out`` matrix.

    Args:
        sigma: ``[..., rank]``, all ``min(d_in, d_out)`` values.
        d_in, d_out: shape of the matrix.
    """
    wide, narrow = max(d_in, d_out), min(d_in, d_out)
    noise = np.median(sigma, axis=-1) / np.sqrt(wide * median_of_law(narrow / wide))
    return np.asarray(noise * (np.sqrt(d_in) + np.sqrt(d_out)))
