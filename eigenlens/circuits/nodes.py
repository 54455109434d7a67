"""The nodes of a circuit: components, with those that cannot be told apart taken together.

Where neighbouring singular values are nearly equal, single directions are arbitrary within their
span. Such a degenerate block (:attr:`eigenlens.spectra.Spectrum.blocks`) is one node; whatever is
said about it sums over its members and does not depend on the basis.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from eigenlens.freezing import FrozenSet, flat_directions
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import COMPONENT, Spectra, Spectrum

EMBED, LOGITS = "embed", "logits"


@dataclass(frozen=True)
class Nodes:
    """Components of a circuit.

    Attributes:
        table: one row per node: ``node`` (its name), ``layer, matrix, head, index`` (of its first
            member), ``size``, ``sigma`` (largest).
        members: one row per component: ``layer, matrix, head, index``, the ``number`` of its node,
            and ``map``, the name of its matrix.
    """

    table: pd.DataFrame
    members: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def on(self, matrix: str) -> np.ndarray:
        """Rows of :attr:`members` that belong to the map ``matrix``."""
        return np.flatnonzero(self.members["map"] == matrix)

    @property
    def maps(self) -> list[str]:
        """Names of the maps that have a node, in the order of their first node."""
        return list(dict.fromkeys(self.members["map"]))


@dataclass(frozen=True)
class Directions:
    """What chosen components of one map read and write.

    Attributes:
        reads: ``σ_i u_i`` as columns, in the input space of all heads side by side.
        writes: ``v_i`` as rows, in the output space of all heads side by side.
    """

    reads: Float[Tensor, "all_in k"]
    writes: Float[Tensor, "k all_out"]


def directions(spectra: Spectra, members: pd.DataFrame) -> Directions:
    """Directions of components that all lie in one map.

    Args:
        spectra: the decomposition.
        members: rows of :attr:`Nodes.members`.
    """
    spectrum = spectra[members["map"].iloc[0]]
    head, index = members["head"].to_numpy(), members["index"].to_numpy()
    return Directions(*flat_directions(spectrum, head, index))


def make_nodes(spectra: Spectra, components: pd.DataFrame) -> Nodes:
    """Nodes that hold these components, degenerate blocks whole.

    Args:
        spectra: the decomposition.
        components: rows with the columns ``layer, matrix, head, index``.

    Raises:
        ValueError: a component that the decomposition does not have, or a missing column.
    """
    missing = [name for name in COMPONENT if name not in components]
    if missing:
        raise ValueError(f"Components need the columns {', '.join(COMPONENT)}; {missing} lack.")
    order = {name: place for place, name in enumerate(spectra)}
    blocks = set()
    for layer, kind, head, index in components[COMPONENT].itertuples(index=False):
        spectrum = spectrum_of(spectra, int(layer), str(kind))
        _check_place(spectrum, int(head), int(index))
        block = int(spectrum.blocks[int(head), int(index)])
        blocks.add((order[spectrum.matrix.name], spectrum.matrix.name, int(head), block))
    rows, members = [], []
    for number, (_, name, head, block) in enumerate(sorted(blocks)):
        spectrum = spectra[name]
        inside = (spectrum.blocks[head] == block).nonzero()[:, 0].tolist()
        place = {"layer": spectrum.matrix.layer, "matrix": spectrum.matrix.kind, "head": head}
        rows.append(
            {
                "node": node_name(spectrum, head, inside),
                **place,
                "index": inside[0],
                "size": len(inside),
                "sigma": float(spectrum.sigma[head, inside[0]]),
            }
        )
        members += [{**place, "index": i, "number": number, "map": name} for i in inside]
    columns = ["node", *COMPONENT, "size", "sigma"]
    return Nodes(
        pd.DataFrame(rows, columns=columns),
        pd.DataFrame(members, columns=[*COMPONENT, "number", "map"]),
    )


def spectrum_of(spectra: Spectra, layer: int, kind: str) -> Spectrum:
    """The decomposition of one map.

    Raises:
        ValueError: it is not among ``spectra``.
    """
    name = f"blocks.{layer}.{kind}"
    if name not in spectra:
        raise ValueError(
            f"{name} is not decomposed; there are {', '.join(list(spectra)[:4])}, … "
            "Call decompose with this matrix and layer."
        )
    return spectra[name]


def _check_place(spectrum: Spectrum, head: int, index: int) -> None:
    heads, rank = spectrum.sigma.shape
    if not (0 <= head < heads and 0 <= index < rank):
        raise ValueError(
            f"{spectrum.matrix.name} has heads 0 to {heads - 1} and indices 0 to {rank - 1}; "
            f"there is no head {head}, index {index}."
        )


def node_name(spectrum: Spectrum, head: int, indices: Iterable[int]) -> str:
    """``L1.W_O[2,13]``: layer, matrix, head and index; MLP maps have no head."""
    inside = list(indices)
    index = f"{inside[0]}" if len(inside) == 1 else f"{inside[0]}–{inside[-1]}"
    place = f"{head},{index}" if spectrum.matrix.head_axis else index
    return f"L{spectrum.matrix.layer}.{spectrum.matrix.kind}[{place}]"


def short_name(matrix: str) -> str:
    """``blocks.1.W_O`` as ``L1.W_O``; other names as they are."""
    return "L" + matrix.removeprefix("blocks.") if matrix.startswith("blocks.") else matrix


def score_rows(scores: Scores, components: pd.DataFrame) -> np.ndarray:
    """Row of each component in ``scores``.

    Raises:
        ValueError: one that was not scored.
    """
    known = pd.MultiIndex.from_frame(scores.components[COMPONENT])
    rows = known.get_indexer(pd.MultiIndex.from_frame(components[COMPONENT]))
    if (rows < 0).any():
        lacking = components[COMPONENT].iloc[int(np.flatnonzero(rows < 0)[0])].to_dict()
        raise ValueError(f"The scores do not hold the component {lacking}.")
    return rows


def means_at(known: FrozenSet, positions: range) -> Float[Tensor, "pos component"]:
    """Mean activations that freezing puts in place at these positions.

    As in freezing: a position that calibration never saw has the mean over positions.
    """
    rows = np.array(positions) - known.positions.start
    if known.bucketed:  # the first column is for all positions before it, too
        rows = rows.clip(min=0)
    inside = (rows >= 0) & (rows < len(known.positions))
    rows = np.where(inside, rows, 0)
    seen = inside & (known.count[rows] > 0)
    return torch.tensor(
        np.where(seen[:, None], known.mean_activation[:, rows].T, known.fallback[None])
    )
