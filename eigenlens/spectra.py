"""Singular value decompositions of every matrix of a model, kept on disk.

``W = Σ_i σ_i u_i v_iᵀ`` per head, with ``u_i`` in the input space (what component i reads) and
``v_i`` in the output space (what it writes). Signs are fixed by making the entry of ``u_i`` with
the largest magnitude positive. Where neighbouring singular values are nearly equal, single
directions are arbitrary within their span: such *degenerate blocks* are flagged.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.linalg
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.files import FileFormatError, cache_dir, load_tensors, save_tensors
from eigenlens.matrices import WeightMatrices, WeightMatrix, weight_matrices
from eigenlens.provenance import Provenance, tensor_hash

# Relative gap below which float32 does not resolve single directions (about 100 units of rounding).
_DEGENERATE_GAP = {torch.float32: 1e-5, torch.float64: 1e-12}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Spectrum:
    """The decomposition of one weight matrix.

    Attributes:
        matrix: the linear map.
        u: input directions, orthonormal columns.
        sigma: singular values, falling.
        vh: output directions, orthonormal rows.
    """

    matrix: WeightMatrix
    u: Float[Tensor, "head d_in rank"]
    sigma: Float[Tensor, "head rank"]
    vh: Float[Tensor, "head rank d_out"]

    def reads(self, x: Float[Tensor, "*batch all_in"]) -> Float[Tensor, "*batch head rank"]:
        """Projected activations ``σ_i (x · u_i)`` of inputs, in units of the output."""
        scaled = self.u * self.sigma[:, None, :]
        if self.matrix.head_axis == "in":
            x = rearrange(x, "... (head d_in) -> ... head d_in", head=self.matrix.n_heads)
            return einsum(x, scaled, "... head d_in, head d_in rank -> ... head rank")
        # One matrix product for all heads, since they share their input.
        flat = x @ rearrange(scaled, "head d_in rank -> d_in (head rank)")
        return rearrange(flat, "... (head rank) -> ... head rank", head=self.matrix.n_heads)

    def writes(self, g: Float[Tensor, "*batch all_out"]) -> Float[Tensor, "*batch head rank"]:
        """Projections ``v_i · g`` of output gradients."""
        if self.matrix.head_axis == "out":
            g = rearrange(g, "... (head d_out) -> ... head d_out", head=self.matrix.n_heads)
            return einsum(g, self.vh, "... head d_out, head rank d_out -> ... head rank")
        flat = g @ rearrange(self.vh, "head rank d_out -> d_out (head rank)")
        return rearrange(flat, "... (head rank) -> ... head rank", head=self.matrix.n_heads)

    @cached_property
    def blocks(self) -> Int[Tensor, "head rank"]:
        """Number of the degenerate block of each component; alone in it means well separated."""
        gap = _DEGENERATE_GAP[self.sigma.dtype] * self.sigma[:, :1].clamp_min(1e-300)
        starts = torch.ones_like(self.sigma, dtype=torch.int64)
        starts[:, 1:] = (self.sigma[:, :-1] - self.sigma[:, 1:] > gap).long()
        return starts.cumsum(1) - 1


class Spectra(Mapping[str, Spectrum]):
    """Decompositions by matrix name (``blocks.0.W_Q``), in the order of the model."""

    def __init__(self, spectra: Iterable[Spectrum], provenance: Provenance) -> None:
        self._spectra = {spectrum.matrix.name: spectrum for spectrum in spectra}
        self.provenance = provenance

    def __getitem__(self, name: str) -> Spectrum:
        return self._spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    @property
    def matrices(self) -> WeightMatrices:
        """The decomposed linear maps."""
        return WeightMatrices(spectrum.matrix for spectrum in self.values())

    @property
    def n_components(self) -> int:
        """Singular values of all matrices together."""
        return sum(spectrum.sigma.numel() for spectrum in self.values())

    def of_kinds(self, kinds: Sequence[str]) -> "Spectra":
        """The decompositions of these kinds of matrices only.

        Raises:
            ValueError: a kind that is not there.
        """
        there = dict.fromkeys(spectrum.matrix.kind for spectrum in self.values())
        missing = [kind for kind in kinds if kind not in there]
        if missing:
            raise ValueError(f"No {', '.join(missing)} here; there are {', '.join(there)}.")
        return Spectra((s for s in self.values() if s.matrix.kind in kinds), self.provenance)

    def to_pandas(self) -> pd.DataFrame:
        """One row per component: ``layer, matrix, head, index, sigma, block, block_size``."""
        return pd.concat([_component_rows(s) for s in self.values()], ignore_index=True)

    def _repr_html_(self) -> str:
        rows = [
            {
                "matrix": name,
                "heads": s.matrix.n_heads,
                "rank": s.matrix.rank,
                "largest σ": float(s.sigma.max()),
                "smallest σ": float(s.sigma.min()),
            }
            for name, s in self.items()
        ]
        return pd.DataFrame(rows).to_html(index=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as one safetensors file."""
        tensors = {
            f"{name}.{part}": getattr(spectrum, part)
            for name, spectrum in self.items()
            for part in ("u", "sigma", "vh")
        }
        save_tensors(path, "spectra", tensors, {"provenance": self.provenance.model_dump()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: TransformerBridge) -> "Spectra":
        """Read back what :meth:`save` wrote for this ``model``.

        Raises:
            FileFormatError: the file is truncated, foreign, or of a model with other weights.
        """
        tensors, metadata = load_tensors(path, "spectra")
        provenance = Provenance(**metadata["provenance"])
        if provenance.model_fingerprint != Provenance.of(model).model_fingerprint:
            raise FileFormatError(f"{path} belongs to a model with other weights.")
        found = [
            Spectrum(m, *(tensors[f"{m.name}.{part}"] for part in ("u", "sigma", "vh")))
            for m in weight_matrices(model)
            if f"{m.name}.sigma" in tensors
        ]
        return cls(found, provenance)


def _component_rows(spectrum: Spectrum) -> pd.DataFrame:
    heads, rank = spectrum.sigma.shape
    blocks = spectrum.blocks.cpu().numpy()
    sizes = np.stack([np.bincount(row, minlength=rank)[row] for row in blocks])
    return pd.DataFrame(
        {
            "layer": spectrum.matrix.layer,
            "matrix": spectrum.matrix.kind,
            "head": np.repeat(np.arange(heads), rank),
            "index": np.tile(np.arange(rank), heads),
            "sigma": spectrum.sigma.flatten().double().cpu().numpy(),
            "block": blocks.flatten(),
            "block_size": sizes.flatten(),
        }
    )


def decompose(
    model: TransformerBridge,
    matrices: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    dtype: str | None = None,
    cache: bool = True,
    progress: bool = True,
) -> Spectra:
    """Singular value decomposition of every weight matrix, per head for attention.

    Args:
        model: a dense transformer.
        matrices: kinds (``W_Q`` … ``W_out``); default all.
        layers: block indices; default all.
        dtype: ``"float32"`` or ``"float64"``; default float64 for float64 models, else float32.
        cache: keep decompositions in the user's cache, keyed by the weight's hash.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown matrix kind, layer or dtype; NaN or infinite weights.
        UnsupportedModelError: the model has blocks without dense matrices.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be 'float32' or 'float64', not {dtype!r}.")
    maps = weight_matrices(model, matrices, layers)
    found = []
    for matrix in tqdm(maps, desc="decompose", unit="matrix", disable=not progress):
        own = torch.float64 if matrix.flat_weight.dtype == torch.float64 else torch.float32
        precision = _DTYPES[dtype] if dtype else own
        found.append(_decompose_matrix(matrix, precision, cache))
    return Spectra(found, Provenance.of(model))


def _decompose_matrix(matrix: WeightMatrix, dtype: torch.dtype, cache: bool) -> Spectrum:
    weight = matrix.weight.detach()
    if not torch.isfinite(weight).all():
        raise ValueError(f"{matrix.name} holds NaN or infinite values; it has no decomposition.")
    if not cache:
        return Spectrum(matrix, *thin_svd(weight.to(dtype)))
    key = f"{tensor_hash(weight)}-{str(dtype).removeprefix('torch.')}"
    path = cache_dir() / "svd" / key[:2] / f"{key}.safetensors"
    u, sigma, vh = (part.to(weight.device) for part in _cached(path, lambda: weight.to(dtype)))
    return Spectrum(matrix, u, sigma, vh)


def _cached(path: Path, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    try:
        tensors, _ = load_tensors(path, "svd")
        return tensors["u"], tensors["sigma"], tensors["vh"]
    except (FileNotFoundError, FileFormatError):  # a damaged cache entry is made anew
        u, sigma, vh = thin_svd(weight())
        save_tensors(path, "svd", {"u": u, "sigma": sigma, "vh": vh})
        return u, sigma, vh


def thin_svd(
    weight: Float[Tensor, "head d_in d_out"],
) -> tuple[
    Float[Tensor, "head d_in rank"], Float[Tensor, "head rank"], Float[Tensor, "head rank d_out"]
]:
    """Thin SVD of each head, with falling singular values and fixed signs.

    Where LAPACK's divide-and-conquer driver does not converge, the QR driver (``gesvd``) is asked
    in float64.
    """
    try:
        u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    except torch.linalg.LinAlgError:
        u, sigma, vh = _svd_by_qr(weight)
    order = sigma.argsort(dim=-1, descending=True, stable=True)
    sigma = sigma.gather(-1, order)
    u = u.gather(-1, order[:, None, :].expand_as(u))
    vh = vh.gather(-2, order[:, :, None].expand_as(vh))
    peak = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(u.dtype)
    return (u * sign).contiguous(), sigma, (vh * sign.transpose(-1, -2)).contiguous()


def _svd_by_qr(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = [
        scipy.linalg.svd(head, full_matrices=False, lapack_driver="gesvd")
        for head in weight.double().cpu().numpy()
    ]
    u, sigma, vh = (torch.from_numpy(np.stack(part)) for part in zip(*heads, strict=True))
    return u.to(weight), sigma.to(weight), vh.to(weight)
