"""A random orthogonal basis in place of the singular one: does the SVD matter?

On the narrower side of a matrix a random orthonormal basis is drawn, and every one of its
directions becomes a component with what the matrix does along it: ``W = Σ_i u_i (u_iᵀ W)`` where
the input is narrower, ``W = Σ_i (W v_i) v_iᵀ`` where the output is. There are as many components as
singular values, their sum is W, and each is scored and frozen like a singular component. The other
side's directions have unit length but are not orthogonal.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from eigenlens.baselines.baseline import Search
from eigenlens.baselines.edits import FrozenEdit
from eigenlens.baselines.ranked import OneShot
from eigenlens.frozen_set import FrozenSet
from eigenlens.scoring import Scores
from eigenlens.spectra import Spectra, Spectrum


@dataclass(frozen=True)
class RandomBasis(OneShot):
    """One-shot eigenpruning on the components of a random orthogonal basis."""

    @property
    def name(self) -> str:
        """With the criterion."""
        return f"random orthogonal basis, {self.criterion}"

    def ranking(self, search: Search) -> Scores:
        """Scores of the components of a random basis."""
        spectra = random_spectra(search.spectra, search.seed)
        return super().ranking(replace(search, spectra=spectra, shared={}))

    def edit(self, frozen: FrozenSet, search: Search) -> FrozenEdit:
        """The file names the seed: the directions do not follow from the weights alone."""
        return FrozenEdit(frozen, control={"basis_seed": search.seed})


def random_spectra(spectra: Spectra, seed: int) -> Spectra:
    """Decompositions of the same matrices along random orthogonal directions."""
    generator = torch.Generator().manual_seed(seed)
    return Spectra((_random(s, generator) for s in spectra.values()), spectra.provenance)


def _random(spectrum: Spectrum, generator: torch.Generator) -> Spectrum:
    weight = spectrum.matrix.weight.detach().to(spectrum.u)
    if spectrum.matrix.d_in <= spectrum.matrix.d_out:
        u, sigma, vh = _along(weight, generator)
    else:
        v, sigma, uh = _along(weight.mT, generator)
        u, vh = uh.mT, v.mT
    order = sigma.argsort(dim=-1, descending=True)
    return Spectrum(
        spectrum.matrix,
        u.gather(-1, order[:, None, :].expand_as(u)).contiguous(),
        sigma.gather(-1, order),
        vh.gather(-2, order[:, :, None].expand_as(vh)).contiguous(),
    )


def _along(
    weight: Float[Tensor, "head narrow wide"], generator: torch.Generator
) -> tuple[
    Float[Tensor, "head narrow narrow"],
    Float[Tensor, "head narrow"],
    Float[Tensor, "head narrow wide"],
]:
    """A random basis of the narrow side, and length and direction of the weight along it."""
    square = torch.randn(
        len(weight), weight.shape[1], weight.shape[1], generator=generator, dtype=torch.float64
    )
    basis = torch.linalg.qr(square).Q.to(weight)
    along = basis.mT @ weight
    length = along.norm(dim=-1)
    return basis, length, along / length[..., None].clamp_min(torch.finfo(length.dtype).tiny)
