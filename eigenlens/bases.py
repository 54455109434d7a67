"""Bases: which coordinates of an activation are the components.

- ``svd``: the singular vectors of the small side, from the Gram matrix of that side in float64.
- ``qk_ov``: the joint maps that circuit work reads. With ``W_V W_O = U S Vᵀ`` of a head, the
  component in the space of ``z`` reads ``r_i = W_O v_i`` and writes ``w_i = u_iᵀ W_V / σ_i``; with
  ``W_Q W_Kᵀ = U S Vᵀ``, in the space of queries, ``r_i = W_Kᵀ v_i`` and ``w_i = u_iᵀ W_Q / σ_i``.
  Where queries and keys are rotated, the latter is the attention score at distance 0, and where
  they are normalised, it holds up to the norms. With grouped-query attention every query head has
  its own.
- ``random``: an orthonormal basis drawn at random: does the SVD matter?
- ``neurons``: the standard basis of the input of ``W_out``.
- ``pca``: principal axes of the activation on given data, those of the largest variance first.

Outside the first two, σ is how long the matrix is along a direction.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.matrices import JOINT, Site, WeightMatrix, map_of
from eigenlens.provenance import text_hash
from eigenlens.spectra import Spectrum

# Relative gap of σ² that float64 resolves, with room for the rounding of a large product.
RESOLUTION = 1e-12
# Singular values below this share of the largest are found apart from it.
TAIL = 1e-3

# Bases whose σ are singular values, and whose components lie in their order.
SINGULAR = ("svd", "qk_ov")

Small = Float[Tensor, "head width far"]
Basis = Float[Tensor, "head width k"]


def precise_weight(weight: Tensor) -> Tensor:
    """In float64, on the CPU where the device has no such type."""
    weight = weight.detach()
    return (weight.cpu() if weight.device.type == "mps" else weight).double()


def small_side(matrix: WeightMatrix, side: str | None = None) -> Small:
    """Each head's weight in float64, the side of the coordinates first."""
    weight = precise_weight(matrix.weight)
    return weight if (side or matrix.side) == "in" else weight.mT


def singular_basis(weight: Small) -> tuple[Basis, Float[Tensor, "head k"]]:
    """Singular vectors of the first side and singular values, falling, with fixed signs.

    The eigenvectors of ``A Aᵀ``; each σ is the length of the matrix along its vector. What is small
    beside the largest σ drowns in the squares of the product, and is decomposed once more on its
    own. Signs: the entry of largest magnitude is positive.
    """
    rank = min(weight.shape[-2:])
    scale = weight.abs().amax((-2, -1), keepdim=True)
    scaled = weight / torch.where(scale > 0, scale, 1)  # squares of 1e-200 would be zero
    _, vectors = torch.linalg.eigh(scaled @ scaled.mT)
    basis = vectors.flip(-1)[..., :rank]
    along = basis.mT @ scaled
    sigma = along.norm(dim=-1)
    for head, n_small in enumerate((sigma < TAIL * sigma[:, :1]).sum(-1).tolist()):
        if n_small:
            turn, sigma[head, -n_small:] = (
                x[0] for x in singular_basis(along[head, None, -n_small:])
            )
            basis[head, :, -n_small:] = basis[head, :, -n_small:] @ turn
    basis, sigma = _falling(basis, sigma)
    return _with_signs(basis), sigma * scale[..., 0]


def _falling(basis: Basis, sigma: Float[Tensor, "head k"]) -> tuple[Basis, Float[Tensor, "head k"]]:
    """The longest directions first."""
    order = sigma.argsort(dim=-1, descending=True, stable=True)
    return basis.gather(-1, order[:, None, :].expand_as(basis)), sigma.gather(-1, order)


def _with_signs(basis: Basis) -> Basis:
    peak = basis.gather(-2, basis.abs().argmax(dim=-2, keepdim=True))
    return torch.where(peak < 0, -basis, basis)


def lengths(weight: Small, basis: Basis) -> Float[Tensor, "head k"]:
    """``‖qᵀ A‖`` of every direction q."""
    return (basis.mT @ weight).norm(dim=-1)


def orthonormal(
    site: Site,
    basis: Basis,
    sigma: Float[Tensor, "head k"],
    dtype: torch.dtype,
    device: torch.device,
    gap: float | None = None,
) -> Spectrum:
    """Components that write where they read."""
    read = basis.to(dtype).to(device).contiguous()
    return Spectrum(site, read, read.mT, _placed(sigma, device), gap)


def _placed(sigma: Tensor, device: torch.device) -> Tensor:
    """Singular values in float64, or the best that the device has."""
    return sigma.to(torch.float32 if device.type == "mps" else torch.float64).to(device)


def svd(matrix: WeightMatrix, dtype: torch.dtype) -> Spectrum:
    """Singular components of one matrix."""
    basis, sigma = singular_basis(small_side(matrix))
    return orthonormal(matrix.site, basis, sigma, dtype, _device(matrix), RESOLUTION)


def random(matrix: WeightMatrix, dtype: torch.dtype, seed: int) -> Spectrum:
    """Components along a random orthonormal basis of the small side, the longest first.

    The draw depends on the seed and the matrix alone, not on which others are decomposed.
    """
    generator = torch.Generator().manual_seed(int(text_hash([seed, matrix.name])[:15], 16))
    weight = small_side(matrix)
    shape = (weight.shape[0], weight.shape[1], min(weight.shape[-2:]))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(weight.device)
    basis = torch.linalg.qr(noise).Q
    basis, sigma = _falling(basis, lengths(weight, basis))
    return orthonormal(matrix.site, basis, sigma, dtype, _device(matrix))


def neurons(matrix: WeightMatrix, dtype: torch.dtype) -> Spectrum:
    """Neurons: the coordinates of the input of ``W_out`` as they are."""
    sigma = small_side(matrix, "in").norm(dim=-1)
    device = _device(matrix)
    return Spectrum(matrix.site_on("in"), None, None, sigma.to(dtype).to(device))


def principal(
    matrix: WeightMatrix, dtype: torch.dtype, covariance: Float[Tensor, "head width width"]
) -> Spectrum:
    """Components along the principal axes of the activation, the largest variance first."""
    weight = small_side(matrix)
    vectors = torch.linalg.eigh(covariance).eigenvectors.flip(-1).to(weight.device)
    basis = _with_signs(vectors[..., : min(weight.shape[-2:])])
    return orthonormal(matrix.site, basis, lengths(weight, basis), dtype, _device(matrix))


def joint(model: TransformerBridge, layer: int, kind: str, dtype: torch.dtype) -> Spectrum:
    """Components of ``W_Q W_Kᵀ`` (``QK``) or ``W_V W_O`` (``OV``), by query head.

    With ``A = Q_A R_A`` and ``B = R_Bᵀ Q_Bᵀ`` the joint map ``A B`` has the singular values of
    ``R_A R_Bᵀ``, and its vectors follow from the small factors alone. Directions beyond the rank of
    the joint map read and write nothing.
    """
    first, second = JOINT[kind]
    own = map_of(model, layer, "W_Q" if kind == "QK" else "W_O")
    inner, outer = (
        _by_query_head(map_of(model, layer, name), own.n_heads) for name in (first, second)
    )
    r_a = torch.linalg.qr(inner).R
    r_b = torch.linalg.qr(outer if kind == "QK" else outer.mT).R
    u, sigma, vh = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
    there = (sigma > RESOLUTION * sigma[:, :1]) & (sigma > 0)
    inverse = torch.where(there, 1 / torch.where(there, sigma, 1), 0)
    read = r_b.mT @ vh.mT * there[:, None, :]
    write = inverse[..., None] * (u.mT @ r_a)
    peak = write.gather(-1, write.abs().argmax(dim=-1, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(write)
    device = _device(own)
    return Spectrum(
        replace(own.site, kind=kind),
        (read * sign.mT).to(dtype).to(device),
        (write * sign).to(dtype).to(device),
        _placed(sigma, device),
        RESOLUTION,
    )


def _by_query_head(matrix: WeightMatrix, n_heads: int) -> Float[Tensor, "head d_in d_out"]:
    """Weights by query head: key/value heads stand once for each query head that they serve."""
    return precise_weight(matrix.weight).repeat_interleave(n_heads // matrix.n_heads, dim=0)


def _device(matrix: WeightMatrix) -> torch.device:
    return matrix.flat_weight.device
