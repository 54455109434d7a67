"""The other side of a component: what it writes where it is read off, and reads where it writes.

A component has its vectors on one side of its map only; ``r_i`` and ``w_i`` of an input go through
the weight to the output, those of an output back to the input. With ``y = x W + b`` the component
of the map is ``E_i = r_i (w_i W)`` for coordinates of x, ``E_i = (W r_i) w_i`` for those of y; in
the singular basis ``σ_i u_i v_iᵀ`` either way. All of this is computed when somebody asks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.matrices import Site, map_of
from eigenlens.spectra import Directions, Spectrum


@dataclass(frozen=True)
class MapDirections:
    """Chosen components of one map as maps of rank one from all of its input to all of its output.

    Attributes:
        reads: what the coordinate is of the map's input, as columns.
        writes: what one unit of the coordinate adds to the map's output, as rows.
        offset: the coordinate at zero input.
    """

    reads: Float[Tensor, "all_in k"]
    writes: Float[Tensor, "k all_out"]
    offset: Float[Tensor, " k"]

    def coordinates(self, x: Float[Tensor, "*batch all_in"]) -> Float[Tensor, "*batch k"]:
        """Coordinates from inputs of the map."""
        return x.to(self.reads.dtype) @ self.reads + self.offset


def map_directions(
    model: TransformerBridge, spectrum: Spectrum, head: np.ndarray, index: np.ndarray
) -> MapDirections:
    """Both sides of chosen components, in the spaces of all heads side by side."""
    own = spectrum.subset(head, index)
    assert own.read is not None
    assert own.write is not None
    matrix = spectrum.site.find(model)
    weight = matrix.flat_weight.detach().to(own.read)
    zero = torch.zeros(len(head), dtype=weight.dtype, device=weight.device)
    if spectrum.site.side == "in":
        return MapDirections(own.read[0], own.write[0] @ weight, zero)
    offset = zero if matrix.bias is None else matrix.bias.detach().to(weight) @ own.read[0]
    return MapDirections(weight @ own.read[0], own.write[0], offset)


def input_vectors(model: TransformerBridge, spectrum: Spectrum) -> Float[Tensor, "head d_in k"]:
    """What each component's coordinate is of the input of its map: ``r_i`` or ``W r_i``."""
    if spectrum.site.side == "in":
        return _filled(spectrum.read, spectrum)
    weight = _weight(model, spectrum)
    return weight if spectrum.read is None else weight @ spectrum.read


def output_vectors(model: TransformerBridge, spectrum: Spectrum) -> Float[Tensor, "head k d_out"]:
    """What one unit of each coordinate adds to the output of its map: ``w_i W`` or ``w_i``."""
    if spectrum.site.side == "out":
        return _filled(spectrum.write, spectrum)
    weight = _weight(model, spectrum)
    return weight if spectrum.write is None else spectrum.write @ weight


def _weight(model: TransformerBridge, spectrum: Spectrum) -> Float[Tensor, "head d_in d_out"]:
    """Each head's weight as numbers of the directions' type."""
    return spectrum.site.find(model).weight.detach().to(spectrum.dtype)


def _filled(vectors: Tensor | None, spectrum: Spectrum) -> Tensor:
    """The vectors, the standard basis written out."""
    if vectors is not None:
        return vectors
    heads, width = spectrum.sigma.shape
    eye = torch.eye(width, dtype=spectrum.dtype, device=spectrum.device)
    return eye.expand(heads, width, width)


def zero_coordinates(model: TransformerBridge, directions: Directions) -> Float[Tensor, "head k"]:
    """Coordinates of a map whose input is zero: ``b · r_i`` on the side of outputs, else zero.

    The input of the joint map ``OV`` is that of ``W_V``, so its coordinates are ``b_V · r_i``,
    which attention passes on unchanged.
    """
    site, read = directions.site, directions.read
    bias = _bias(model, site)
    like = site.find(model).flat_weight if read is None else read
    if bias is None:
        bias = like.new_zeros(site.n_heads * site.width)
    return directions.coordinates(bias.detach().to(like).view(site.n_heads, site.width))


def _bias(model: TransformerBridge, site: Site) -> Float[Tensor, " all_width"] | None:
    if site.kind != "OV":
        return site.find(model).bias if site.side == "out" else None
    values = map_of(model, site.layer, "W_V")
    if values.bias is None:
        return None
    served = site.n_heads * site.width // len(values.bias)  # query heads of each value head
    by_head = rearrange(values.bias, "(head width) -> head width", head=values.n_heads)
    return by_head.repeat_interleave(served, dim=0).flatten()


def unit(vectors: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """Vectors at length one; zero stays zero."""
    tiny = torch.finfo(vectors.dtype).tiny
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(tiny)


def scaled_heads(
    model: TransformerBridge, spectrum: Spectrum, factor: Float[Tensor, "head k"]
) -> Float[Tensor, "head d_in d_out"]:
    """``Σ_i f_i E_i`` of each head, differentiable in the factors.

    With factors of one, a complete basis gives the weight back.
    """
    own = _weight(model, spectrum)
    read, write = _filled(spectrum.read, spectrum), _filled(spectrum.write, spectrum)
    scaled = einsum(read, factor, write, "head i k, head k, head k o -> head i o")
    return scaled @ own if spectrum.site.side == "in" else own @ scaled
