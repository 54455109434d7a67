"""Many edits in one pass: the rows of a batch repeated, and in every copy another edit.

Copy k of row b is row ``k · rows + b``.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from eigenlens.spectra import Directions, Spectrum, freeze_coordinates

MOST_ROWS = 400  # rows of a pass: more do not make a processor faster, and take memory


def tiled(value: Tensor, n_copies: int) -> Tensor:
    """Every row once for each copy."""
    return value.repeat(n_copies, *[1] * (value.ndim - 1))


def tiled_beside(value: Any, n_copies: int, n_rows: int) -> Any:
    """What goes along with the rows: masks and positions with a row per example (and head)."""
    if isinstance(value, tuple):
        return tuple(tiled_beside(part, n_copies, n_rows) for part in value)
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] % n_rows == 0:
        return tiled(value, n_copies)
    return value


class CopyEdit:
    """A hook that freezes component k of one matrix in copy k: copies take the place of heads."""

    def __init__(
        self,
        spectrum: Spectrum,
        head: np.ndarray,
        index: np.ndarray,
        mean: Float[Tensor, "#batch pos k"],
        *,
        copies: np.ndarray,
        n_copies: int,
        strength: float = 1.0,
    ) -> None:
        """Components ``head, index``, one for each of ``copies``, go to ``mean``."""
        flat = spectrum.subset(head, index)
        assert flat.read is not None
        assert flat.write is not None
        self._own: Directions = replace(
            flat,
            read=rearrange(flat.read, "1 width k -> k width 1"),
            write=rearrange(flat.write, "1 k width -> k 1 width"),
        )
        self._mean = mean.to(flat.write)[..., None]
        self._copies = torch.tensor(copies, device=flat.write.device)
        self._n = n_copies
        self._strength = strength

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        h = self._own.site.split(value, self._mean.shape[1])
        h = rearrange(h, "(copy b) pos 1 width -> b pos copy width", copy=self._n)
        edited = freeze_coordinates(h[:, :, self._copies], self._own, self._mean, self._strength)
        h = h.index_copy(2, self._copies, edited)
        h = rearrange(h, "b pos copy width -> (copy b) pos width")
        return h.reshape(value.shape).contiguous()  # Conv1D takes a view of its input
