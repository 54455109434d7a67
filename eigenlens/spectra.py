"""Directions of components, and the coordinates of an activation along them.

Component i of a matrix is one coordinate of one activation ``h`` (:class:`eigenlens.matrices.Site`)
with a read vector ``r_i`` and a write vector ``w_i``, where ``w_i · r_j = δ_ij``:

    ``c_i = h · r_i``,   ``h' = h + z (c̄_i − c_i) w_i``

and freezing with strength z puts c̄ in place of c. In the singular basis both are the singular
vector of the small side, ``u_i`` or ``v_i``; what the component does on the other side follows from
the weight (:mod:`eigenlens.far_side`). A decomposition belongs to weights, not to one model object.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.files import FileFormatError, load_tensors, save_tensors
from eigenlens.matrices import Site
from eigenlens.places import Place
from eigenlens.provenance import Provenance

D = TypeVar("D", bound="Directions")
COMPONENT = ["layer", "matrix", "head", "index"]


def by_matrix(components: pd.DataFrame) -> dict[str, np.ndarray]:
    """Rows of the components of each matrix, by its name, in the order of their first one."""
    names = "blocks." + components["layer"].astype(str) + "." + components["matrix"].astype(str)
    groups = components.groupby(names.to_numpy(), sort=False).indices
    return {str(name): np.asarray(rows) for name, rows in groups.items()}


@dataclass(frozen=True)
class Directions:
    """Read and write vectors of coordinates of one activation.

    Attributes:
        site: the activation.
        read: ``r_i`` as columns, head by head; ``None``: the standard basis.
        write: ``w_i`` as rows, head by head; ``None``: the standard basis.
        place: of its map in the plain transformers model, if it has one there.
    """

    site: Site
    read: Float[Tensor, "head width k"] | None
    write: Float[Tensor, "head k width"] | None
    place: Place | None = field(default=None, kw_only=True)

    def coordinates(self, h: Float[Tensor, "*batch head width"]) -> Float[Tensor, "*batch head k"]:
        """``c_i = h · r_i``."""
        if self.read is None:
            return h
        return einsum(h, self.read, "... head width, head width k -> ... head k")

    def slopes(self, g: Float[Tensor, "*batch head width"]) -> Float[Tensor, "*batch head k"]:
        """``w_i · g``: the derivative along a coordinate, from the gradient by the activation."""
        if self.write is None:
            return g
        return einsum(g, self.write, "... head width, head k width -> ... head k")

    def compose(self, c: Float[Tensor, "*batch head k"]) -> Float[Tensor, "*batch head width"]:
        """``Σ_i c_i w_i``."""
        if self.write is None:
            return c
        return einsum(c, self.write, "... head k, head k width -> ... head width")

    @property
    def is_orthonormal(self) -> bool:
        """Whether components write where they read, with one tensor for both."""
        if self.read is None or self.write is None:
            return self.read is self.write
        return self.write.is_set_to(self.read.mT)

    @property
    def device(self) -> torch.device:
        """Where the directions are."""
        assert self.read is not None
        return self.read.device

    @property
    def n_components(self) -> int:
        """How many coordinates of each head there are."""
        assert self.read is not None
        return self.read.shape[2]

    def to(self: D, device: torch.device | str) -> D:
        """The same directions on another device."""
        if self.device == torch.device(device):
            return self
        read = None if self.read is None else self.read.to(device)
        write = None if self.write is None else self.write.to(device)
        if self.is_orthonormal and read is not None:
            write = read.mT
        return replace(self, read=read, write=write)

    def header(self) -> list[Any]:
        """What a file must hold, beside :meth:`tensors`: the site and the place."""
        return [astuple(self.site), None if self.place is None else astuple(self.place)]

    def tensors(self) -> dict[str, Tensor]:
        """What a file must hold; equal read and write vectors once."""
        found = {"read": self.read, "write": None if self.is_orthonormal else self.write}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of_tensors(
        cls: type[D], header: Sequence[Any], tensors: Mapping[str, Tensor], name: str, **rest: Any
    ) -> D:
        """Put together what :meth:`header` and :meth:`tensors` gave, these under ``{name}.``."""
        site, place = Site(*header[0]), Place.read(header[1])
        read = tensors.get(f"{name}.read")
        return cls(
            site,
            read,
            tensors.get(f"{name}.write", None if read is None else read.mT),
            place=place,
            **rest,
        )


def moved_coordinates(
    h: Float[Tensor, "*batch head width"],
    directions: Directions,
    mean: Float[Tensor, "*#batch head k"],
    strength: Float[Tensor, "*#batch head k"] | Float[Tensor, ""] | float,
) -> Float[Tensor, "*batch head k"]:
    """``(c̄ − h R) ∘ z``: how far freezing moves each coordinate."""
    return (mean - directions.coordinates(h.to(mean.dtype))) * strength


def freeze_coordinates(
    h: Float[Tensor, "*batch head width"],
    directions: Directions,
    mean: Float[Tensor, "*#batch head k"],
    strength: Float[Tensor, "*#batch head k"] | Float[Tensor, ""] | float,
) -> Float[Tensor, "*batch head width"]:
    """``h + ((c̄ − h R) ∘ z) W``: the formula of freezing, gates, exact effects and cuts alike."""
    moved = moved_coordinates(h, directions, mean, strength)
    return h + directions.compose(moved).to(h.dtype)


@dataclass(frozen=True)
class Spectrum(Directions):
    """All components of one matrix.

    Attributes:
        sigma: singular values, falling; in other bases how long the matrix is along a direction.
        gap: relative gap of neighbouring ``σ²`` below which float64 does not tell directions apart;
            ``None`` for bases whose directions are given, not found.
    """

    sigma: Float[Tensor, "head k"]
    gap: float | None = None

    @property
    def name(self) -> str:
        """Name of the matrix, or of the joint map."""
        return self.site.name

    @property
    def dtype(self) -> torch.dtype:
        """In which coordinates are computed and summed."""
        return self.sigma.dtype if self.read is None else self.read.dtype

    @property
    def device(self) -> torch.device:
        """Where the directions are."""
        return self.sigma.device

    @cached_property
    def blocks(self) -> Int[Tensor, "head k"]:
        """Number of the degenerate block of each component; alone in it means well separated.

        Where neighbouring singular values are nearly equal, single directions are arbitrary within
        their span: where ``σ²`` differ by less than ``gap`` of what was decomposed at once
        (:func:`eigenlens.bases.singular_basis`), or are zero to rounding.
        """
        starts = torch.ones_like(self.sigma, dtype=torch.int64)
        if self.gap is not None:
            square = (self.sigma / self.sigma[:, :1].clamp_min(1e-300)).square()
            at_once = (square[:, :-1] * 1e6).clamp_max(1)
            apart = square[:, :-1] - square[:, 1:] > self.gap * at_once
            starts[:, 1:] = (apart & (square[:, :-1] > 1e-28)).long()
        return starts.cumsum(1) - 1

    def to(self, device: torch.device | str) -> "Spectrum":
        """The same directions on another device."""
        moved = super().to(device)
        return moved if moved is self else replace(moved, sigma=self.sigma.to(device))

    def subset(self, head: np.ndarray, index: np.ndarray) -> Directions:
        """Some components as directions in the space of all heads side by side.

        Raises:
            ValueError: there is no such component.
        """
        n_heads, k = self.sigma.shape
        beyond = (head < 0) | (head >= n_heads) | (index < 0) | (index >= k)
        if beyond.any():
            raise ValueError(
                f"{self.name} has {n_heads} heads of {k} components, and no component "
                f"{index[beyond][0]} of a head {head[beyond][0]}: this belongs to another model."
            )
        heads, places = (torch.tensor(part, device=self.device) for part in (head, index))
        flat = replace(self.site, n_heads=1, width=self.site.n_heads * self.site.width)
        read = self._scattered(None if self.read is None else self.read.mT, heads, places)
        write = self._scattered(self.write, heads, places)
        # Laid out as a file gives them back: sums of another order differ in the last bit.
        return Directions(flat, read.mT.contiguous(), write, place=self.place)

    def _scattered(
        self, rows: Float[Tensor, "head k width"] | None, heads: Tensor, places: Tensor
    ) -> Float[Tensor, "1 n all_width"]:
        number = torch.arange(len(heads), device=self.device)
        shape = (len(heads), self.site.n_heads, self.site.width)
        wide = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if rows is None:
            wide[number, heads, places] = 1
        else:
            wide[number, heads] = rows[heads, places]
        return wide.flatten(1)[None]


class Spectra(Mapping[str, Spectrum]):
    """Decompositions by matrix name (``blocks.0.W_Q``), in the order of the model.

    Attributes:
        provenance: the model that was decomposed.
        basis: ``svd``, ``qk_ov``, ``random``, ``neurons`` or ``pca``.
        seed: of the ``random`` basis.
    """

    def __init__(
        self,
        spectra: Iterable[Spectrum],
        provenance: Provenance,
        basis: str = "svd",
        seed: int | None = None,
    ) -> None:
        self._spectra = {spectrum.name: spectrum for spectrum in spectra}
        self.provenance = provenance
        self.basis = basis
        self.seed = seed

    def __getitem__(self, name: str) -> Spectrum:
        return self._spectra[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._spectra)

    def __len__(self) -> int:
        return len(self._spectra)

    @property
    def n_components(self) -> int:
        """Components of all matrices together."""
        return sum(spectrum.sigma.numel() for spectrum in self.values())

    @property
    def sizes(self) -> list[int]:
        """Components of each matrix, in order."""
        return [spectrum.sigma.numel() for spectrum in self.values()]

    @cached_property
    def components(self) -> pd.DataFrame:
        """One row per component: ``layer, matrix, head, index, sigma``."""
        sites = [s.site for s in self.values()]
        shapes = [tuple(s.sigma.shape) for s in self.values()]
        heads = [np.repeat(np.arange(n), k) for n, k in shapes]
        places = [np.tile(np.arange(k), n) for n, k in shapes]
        sigma = [s.sigma.flatten().cpu().double().numpy() for s in self.values()]
        return pd.DataFrame(
            {
                "layer": np.repeat([site.layer for site in sites], self.sizes),
                "matrix": np.repeat([site.kind for site in sites], self.sizes),
                "head": np.concatenate([*heads, np.zeros(0, np.int64)]),
                "index": np.concatenate([*places, np.zeros(0, np.int64)]),
                "sigma": np.concatenate([*sigma, np.zeros(0)]),
            }
        )

    def on(self, model: TransformerBridge) -> "Spectra":
        """The same directions, each where the model at hand has its weight.

        Raises:
            ValueError: the model has other weights, or lacks one of the matrices.
        """
        found = Provenance.of(model).model_fingerprint
        if self.provenance.model_fingerprint != found:
            raise ValueError(
                "These spectra belong to a model with other weights: call decompose again."
            )
        moved = [s.to(s.site.find(model).flat_weight.device) for s in self.values()]
        return self.with_spectra(moved)

    def with_spectra(self, spectra: Iterable[Spectrum]) -> "Spectra":
        """Other matrices of the same model in the same basis."""
        return Spectra(spectra, self.provenance, self.basis, self.seed)

    def select(
        self, matrices: Sequence[str] | None = None, layers: Sequence[int] | None = None
    ) -> "Spectra":
        """The decompositions of these kinds of matrices, in these layers, only.

        Raises:
            ValueError: a kind or layer that is not there.
        """
        wanted: dict[str, Sequence[Any] | None] = {"kind": matrices, "layer": layers}
        for part, values in wanted.items():
            there = dict.fromkeys(getattr(spectrum.site, part) for spectrum in self.values())
            missing = [value for value in values or () if value not in there]
            if missing:
                raise ValueError(
                    f"No {part} {', '.join(map(str, missing))} here; "
                    f"there are {', '.join(map(str, there))}."
                )
        return self.with_spectra(
            s
            for s in self.values()
            if (matrices is None or s.site.kind in matrices)
            and (layers is None or s.site.layer in layers)
        )

    def to_pandas(self) -> pd.DataFrame:
        """One row per component: ``layer, matrix, head, index, sigma, block, block_size``."""
        blocks = [s.blocks.cpu().numpy() for s in self.values()]
        sizes = [np.bincount(row, minlength=len(row))[row] for part in blocks for row in part]
        return self.components.assign(
            block=np.concatenate([part.flatten() for part in blocks]),
            block_size=np.concatenate(sizes),
        )

    def _repr_html_(self) -> str:
        rows = [
            {
                "matrix": name,
                "heads": s.site.n_heads,
                "coordinates of": f"hook_{s.site.side}",
                "rank": s.sigma.shape[1],
                "largest σ": float(s.sigma.max()),
                "smallest σ": float(s.sigma.min()),
            }
            for name, s in self.items()
        ]
        return pd.DataFrame(rows).to_html(index=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything as one safetensors file; equal read and write vectors once."""
        tensors: dict[str, Tensor] = {}
        for name, s in self.items():
            tensors |= {f"{name}.{part}": value for part, value in s.tensors().items()}
            tensors[f"{name}.sigma"] = s.sigma
        sites = {name: [s.header(), s.gap] for name, s in self.items()}
        rest = {"basis": self.basis, "seed": self.seed, "sites": sites}
        save_tensors(path, "spectra", tensors, {**rest, "provenance": self.provenance.model_dump()})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: TransformerBridge) -> "Spectra":
        """Read back what :meth:`save` wrote for this ``model``.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: the file is truncated, foreign, or of a model with other weights.
        """
        tensors, metadata = load_tensors(path, "spectra")
        try:
            found = [
                Spectrum.of_tensors(header, tensors, name, sigma=tensors[f"{name}.sigma"], gap=gap)
                for name, (header, gap) in metadata["sites"].items()
            ]
            provenance = Provenance(**metadata["provenance"])
            spectra = cls(found, provenance, metadata["basis"], metadata["seed"])
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}.") from error
        try:
            return spectra.on(model)
        except ValueError as error:
            raise FileFormatError(f"{path}: {error}") from error
