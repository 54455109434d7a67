"""Diagonal fine-tuning of singular values (SVF): one trained factor per singular component.

``W' = Σ_i f_i σ_i u_i v_iᵀ`` from f = 1, over the components that eigenpruning chooses from.
Sources: SVF (Sun et al., 2022, arXiv 2206.06122); Transformer² (Sun et al., 2025).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.baseline import Search
from eigenlens.baselines.edits import WeightEdit
from eigenlens.baselines.training import Trainable, Trained, replaced
from eigenlens.decomposition import decompose
from eigenlens.matrices import join_heads
from eigenlens.spectra import Spectra, Spectrum


@dataclass(frozen=True)
class SpectralEdit(WeightEdit):
    """Scales singular values; ``tensors`` holds the factors of each matrix, ``[head, rank]``."""

    spectra: Spectra | None = field(default=None, repr=False, compare=False)

    def changes(self, model: TransformerBridge) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix with its singular values scaled."""
        spectra = self.spectra if self.spectra is not None else decompose(model, progress=False)
        for name, factors in self.tensors.items():
            weight = spectra[name].matrix.flat_weight
            yield weight, weight + change_by(spectra[name], factors).to(weight)


def change_by(
    spectrum: Spectrum, factors: Float[Tensor, "head rank"]
) -> Float[Tensor, "all_in all_out"]:
    """``Σ_i (f_i − 1) σ_i u_i v_iᵀ``, heads side by side."""
    scaled = spectrum.u * (spectrum.sigma * (factors.to(spectrum.sigma) - 1))[:, None, :]
    return join_heads(scaled @ spectrum.vh, spectrum.matrix.head_axis)


class TrainableFactors(Trainable):
    """A factor per singular value, one at first."""

    def __init__(self, spectra: Spectra) -> None:
        self.spectra = spectra
        self.maps = {spectrum.matrix: _Scaled(spectrum) for spectrum in spectra.values()}

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
    """A linear map with scaled singular values."""

    def __init__(self, spectrum: Spectrum) -> None:
        super().__init__()
        self.spectrum = spectrum
        self.linear = spectrum.matrix.module
        self.factors = nn.Parameter(torch.ones_like(spectrum.sigma))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ change_by(self.spectrum, self.factors).to(x)


@dataclass(frozen=True)
class Svf(Trained):
    """Trains a factor per singular value of every matrix of the spectra."""

    name: str = "SVF"

    def trainables(self, search: Search) -> Iterator[tuple[dict[str, Any], Trainable]]:
        """All factors."""
        yield {}, TrainableFactors(search.spectra)
