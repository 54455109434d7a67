"""``decompose``: the components of every matrix of a model, in one of several bases."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import pandas as pd
import torch
from datasets import Dataset
from einops import einsum
from tqdm.auto import tqdm

from eigenlens import bases
from eigenlens import cache as disk
from eigenlens.bridges import TransformerBridge
from eigenlens.costs import trim_heap
from eigenlens.matrices import (
    JOINT,
    JOINT_KINDS,
    MATRIX_KINDS,
    Site,
    WeightMatrices,
    WeightMatrix,
    checked_kinds,
    weight_matrices,
)
from eigenlens.passes import Activation, FiniteCheck, record, without_padding
from eigenlens.places import places
from eigenlens.provenance import Provenance, tensor_hash
from eigenlens.spectra import Spectra, Spectrum
from eigenlens.tasks.batches import Batch, make_batches

Basis = Literal["svd", "qk_ov", "random", "neurons", "pca"]
_KINDS_OF = {"qk_ov": JOINT_KINDS, "neurons": ("W_out",)}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_TRIMMED = 1 << 24  # bytes of directions after which freed memory is given back


def decompose(
    model: TransformerBridge,
    matrices: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    *,
    skip_unsupported: bool = False,
    basis: Basis | str = "svd",
    data: Dataset | None = None,
    seed: int = 0,
    dtype: str | None = None,
    cache: bool = True,
    progress: bool = True,
) -> Spectra:
    """Components of every weight matrix, per head for attention.

    Args:
        model: a transformer, dense unless ``skip_unsupported``.
        matrices: kinds (``W_Q`` … ``W_out``); default all. For ``qk_ov`` they are ``QK`` and
            ``OV``; ``neurons`` has ``W_out`` only.
        layers: block indices; default all.
        skip_unsupported: decompose what is dense of a model that is not
            (:func:`eigenlens.weight_matrices`).
        basis: what the components are (:mod:`eigenlens.bases`).
        data: examples that ``pca`` takes the activations on.
        seed: of the ``random`` basis.
        dtype: of the directions, ``"float32"`` or ``"float64"``; default float64 for float64
            models, else float32. They are found in float64 either way.
        cache: keep singular bases in the user's cache, keyed by the weight's hash
            (:mod:`eigenlens.cache`). Turn it off for weights that are thrown away.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown basis, matrix kind, layer or dtype; NaN or infinite weights; ``pca``
            without data.
        UnsupportedModelError: the model has blocks without dense matrices.
    """
    if basis not in get_args(Basis):
        raise ValueError(f"Unknown basis {basis!r}; choose from {', '.join(get_args(Basis))}.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype must be 'float32' or 'float64', not {dtype!r}.")
    if (basis == "pca") != (data is not None):
        raise ValueError("basis='pca' needs data=, and no other basis takes any.")
    listed = partial(weight_matrices, model, layers=layers, skip_unsupported=skip_unsupported)
    makers = _makers(model, listed, matrices, basis, data, seed, _DTYPES.get(dtype or ""), cache)
    bar = tqdm(makers, desc="decompose", unit="matrix", disable=not progress)
    known = places(model)
    found: list[Spectrum] = []
    passed = 0
    for make in bar:
        spectrum = make()
        found.append(replace(spectrum, place=known.get(spectrum.site.find(model).module)))
        passed += 0 if spectrum.write is None else spectrum.write.nbytes
        if passed > _TRIMMED:  # what passes through on the way lies among what is kept
            trim_heap()
            passed = 0
    spectra = Spectra(found, Provenance.of(model, for_edits=True), basis, seed)
    if cache:
        disk.trim()
    return spectra


def kinds_of(basis: str, matrices: Iterable[str] | None) -> tuple[str, ...] | None:
    """The kinds of matrices that a basis is asked for; ``None`` for all that a model has.

    Raises:
        ValueError: one that this basis does not have.
    """
    own = _KINDS_OF.get(basis)
    if matrices is None:
        return own
    try:
        return checked_kinds(matrices, own or MATRIX_KINDS)
    except ValueError as error:
        raise ValueError(f"basis={basis!r}: {error}") from error


def decomposed_again(
    model: TransformerBridge, components: pd.DataFrame, basis: str, seed: int | None
) -> Spectra:
    """The decomposition that components read from a file are of.

    Args:
        model: with the weights that they belong to.
        components: rows with the columns ``layer`` and ``matrix``.
        basis: of the components.
        seed: of a ``random`` basis.

    Raises:
        ValueError: a ``pca`` basis, which follows from data and not from weights.
    """
    if basis == "pca":
        raise ValueError(
            "The directions of a pca basis follow from data: give the spectra by "
            "dataclasses.replace(…, spectra=…)."
        )
    kinds, layers = (sorted(set(components[name])) for name in ("matrix", "layer"))
    return decompose(
        model, kinds, layers, skip_unsupported=True, basis=basis, seed=seed or 0, progress=False
    )


def _makers(
    model: TransformerBridge,
    listed: Callable[..., WeightMatrices],
    matrices: Iterable[str] | None,
    basis: str,
    data: Dataset | None,
    seed: int,
    dtype: torch.dtype | None,
    cached: bool,
) -> list[Callable[[], Spectrum]]:
    """What makes each decomposition, in the order of the model."""
    kinds = kinds_of(basis, matrices)
    if basis == "qk_ov":
        assert kinds is not None
        maps = {m.name: m for m in listed(["W_Q", "W_K", "W_V", "W_O"])}
        _check_finite(maps.values())
        return [
            partial(bases.joint, model, m.layer, kind, dtype or working_dtype(m))
            for m in maps.values()
            for kind in kinds
            if m.kind == JOINT[kind][0] and f"blocks.{m.layer}.{JOINT[kind][1]}" in maps
        ]
    found = listed(kinds)
    _check_finite(found)
    if basis == "neurons":
        return [partial(bases.neurons, m, dtype or working_dtype(m)) for m in found]
    if basis == "random":
        return [partial(bases.random, m, dtype or working_dtype(m), seed) for m in found]
    if basis == "pca":
        assert data is not None
        axes = _covariances(model, [m.site for m in found], data)
        return [partial(bases.principal, m, dtype or working_dtype(m), axes[m.name]) for m in found]
    make = _cached_svd if cached else bases.svd
    return [partial(make, m, dtype or working_dtype(m)) for m in found]


def working_dtype(matrix: WeightMatrix) -> torch.dtype:
    """In which coordinates of this matrix are computed and summed."""
    return torch.promote_types(matrix.flat_weight.dtype, torch.float32)


def _check_finite(matrices: Iterable[WeightMatrix]) -> None:
    for matrix in matrices:
        if not torch.isfinite(matrix.flat_weight).all():
            raise ValueError(
                f"{matrix.name} holds NaN or infinite values; it has no decomposition."
            )


def _cached_svd(matrix: WeightMatrix, dtype: torch.dtype) -> Spectrum:
    name = str(dtype).removeprefix("torch.")
    key = f"{tensor_hash(matrix.weight)}-{matrix.side}-{name}"
    found: list[Spectrum] = []

    def make() -> dict[str, torch.Tensor]:
        found.append(bases.svd(matrix, dtype))
        assert found[0].read is not None
        return {"basis": found[0].read, "sigma": found[0].sigma}

    tensors = disk.kept(key, make)
    if found:
        return found[0]
    device = matrix.flat_weight.device
    basis, sigma = tensors["basis"], tensors["sigma"]
    return bases.orthonormal(matrix.site, basis, sigma, dtype, device, bases.RESOLUTION)


def _covariances(
    model: TransformerBridge, sites: Sequence[Site], data: Dataset, batch_size: int = 50
) -> dict[str, torch.Tensor]:
    """Covariance of each site's activation over the tokens of ``data``, head by head."""
    total: dict[str, torch.Tensor] = {}
    square: dict[str, torch.Tensor] = {}
    finite = FiniteCheck()
    batches = make_batches(data, model, batch_size)
    for batch in batches:

        def add(site: Site, h: Activation, batch: Batch = batch) -> None:
            h = bases.precise_weight(without_padding(h, batch))
            outer = einsum(h, h, "b p head x, b p head y -> head x y")
            total[site.name] = total.get(site.name, 0) + h.sum((0, 1))
            square[site.name] = square.get(site.name, 0) + outer

        record(model, sites, batch, add, finite)
    finite.check()
    count = int(sum(batch.attention_mask.sum() for batch in batches))
    means = {name: value / count for name, value in total.items()}
    return {
        name: square[name] / count - einsum(mean, mean, "head x, head y -> head x y")
        for name, mean in means.items()
    }
