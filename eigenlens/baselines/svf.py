"""Diagonal fine-tuning of singular values (SVF): one trained factor per singular component.

``W' = Σ_i f_i σ_i u_i v_iᵀ`` from f = 1, over the components that eigenpruning chooses from.
Sources: SVF (Sun et al., 2022, arXiv 2206.06122); Transformer² (Sun et al., 2025).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.baseline import Search
from eigenlens.baselines.edits import WeightEdit
from eigenlens.baselines.training import Trainable, Trained, replaced
from eigenlens.decomposition import decompose
from eigenlens.far_side import scaled_heads, zero_coordinates
from eigenlens.matrices import join_heads
from eigenlens.spectra import Spectra, Spectrum, freeze_coordinates


@dataclass(frozen=True)
class SpectralEdit(WeightEdit):
    """Scales singular values; ``tensors`` holds the factors of each matrix, ``[head, rank]``."""

    spectra: Spectra | None = field(default=None, repr=False, compare=False)

    def changes(self, model: TransformerBridge) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix with its singular values scaled."""
        spectra = decompose(model, progress=False) if self.spectra is None else self.spectra
        for name, factors in self.tensors.items():
            matrix = spectra[name].site.find(model)
            # What is added, and not the sum of all components: a factor of 1 changes nothing.
            change = scaled_heads(model, spectra[name], factors - 1)
            weight = matrix.flat_weight
            yield weight, weight + join_heads(change, matrix.head_axis).to(weight)


class TrainableFactors(Trainable):
    """A factor per singular value, one at first."""

    def __init__(self, model: TransformerBridge, spectra: Spectra) -> None:
        self.spectra = spectra.on(model)
        self.maps = {s.site.find(model): _Scaled(model, s) for s in self.spectra.values()}

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The factors of each matrix."""
        return [scaled.factors for scaled in self.maps.values()]

    def live(self, model: TransformerBridge) -> AbstractContextManager[None]:
        """Run the scaled maps."""
        return replaced(model, self.maps)

    def edit(self) -> SpectralEdit:
        """The factors as they are now."""
        factors = {m.name: s.factors.detach().clone() for m, s in self.maps.items()}
        return SpectralEdit(factors, spectra=self.spectra)


class _Scaled(nn.Module):
    """A linear map with scaled singular values.

    Scaled by f is frozen with strength 1 − f at the coordinates of zero input: on the small side a
    component is a coordinate, and no weight has to be put together.
    """

    def __init__(self, model: TransformerBridge, spectrum: Spectrum) -> None:
        super().__init__()
        self.spectrum = spectrum
        self.linear = spectrum.site.find(model).module
        self.zero = zero_coordinates(model, spectrum)
        self.factors = nn.Parameter(torch.ones_like(self.zero))

    def forward(self, x: Tensor) -> Tensor:
        if self.spectrum.site.side == "in":
            return self.linear(self._scale(x))
        return self._scale(self.linear(x))

    def _scale(self, h: Tensor) -> Tensor:
        site = self.spectrum.site
        by_head = h.unflatten(-1, (site.n_heads, site.width))
        return freeze_coordinates(by_head, self.spectrum, self.zero, 1 - self.factors).flatten(-2)


@dataclass(frozen=True)
class Svf(Trained):
    """Trains a factor per singular value of every matrix of the spectra."""

    name: str = "SVF"

    def trainables(self, search: Search) -> Iterator[tuple[dict[str, Any], Trainable]]:
        """All factors."""
        yield {}, TrainableFactors(search.model, search.in_basis("svd").spectra)
