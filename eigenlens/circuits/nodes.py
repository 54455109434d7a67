"""The nodes of a circuit: components, with those that cannot be told apart taken together.

Where neighbouring singular values are nearly equal, single directions are arbitrary within their
span. Such a degenerate block (:attr:`eigenlens.spectra.Spectrum.blocks`) is one node; whatever is
said about it sums over its members and does not depend on the basis.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.far_side import MapDirections, map_directions
from eigenlens.matrices import MLP_KINDS, Site
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import COMPONENT, Spectra, Spectrum, by_matrix

EMBED, LOGITS = "embed", "logits"


@dataclass(frozen=True)
class Node:
    """A component, or a degenerate block.

    Attributes:
        name: as :func:`node_name` gives it.
        spectrum: the decomposition that it is of.
        head: where it lies.
        index: of its members.
    """

    name: str
    spectrum: Spectrum
    head: int
    index: np.ndarray

    @property
    def site(self) -> Site:
        """The activation that it is a coordinate of."""
        return self.spectrum.site

    def ends(self, model: TransformerBridge) -> MapDirections:
        """What its members read from their map's input and write to its output."""
        return map_directions(model, self.spectrum, np.full_like(self.index, self.head), self.index)


@dataclass(frozen=True)
class Nodes:
    """Components of a circuit.

    Attributes:
        spectra: the decomposition that they are of.
        table: one row per node: ``node`` (its name), ``layer, matrix, head, index`` (of its first
            member), ``size``, ``sigma`` (largest).
        members: one row per component: ``layer, matrix, head, index``, the ``number`` of its node.
    """

    spectra: Spectra
    table: pd.DataFrame
    members: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Node]:
        for name, layer, kind, head, first, size, _ in self.table.itertuples(index=False):
            spectrum = self.spectra[f"blocks.{layer}.{kind}"]
            yield Node(name, spectrum, head, np.arange(first, first + size))

    def by_spectrum(self) -> Iterator[tuple[Spectrum, np.ndarray]]:
        """Every decomposition that has a node, and the rows of :attr:`members` in it."""
        for name, rows in by_matrix(self.members).items():
            yield self.spectra[name], rows

    def members_of(self, node: str) -> pd.DataFrame:
        """Rows of :attr:`members` that the node of this name holds."""
        number = np.flatnonzero(self.table["node"] == node)[0]
        return self.members[self.members["number"] == number]


def make_nodes(spectra: Spectra, components: pd.DataFrame) -> Nodes:
    """Nodes that hold these components, degenerate blocks whole, in the order of the model.

    Args:
        spectra: the decomposition.
        components: rows with the columns ``layer, matrix, head, index``.

    Raises:
        ValueError: a component that the decomposition does not have, or a missing column.
    """
    missing = [name for name in COMPONENT if name not in components]
    if missing:
        raise ValueError(f"Components need the columns {', '.join(COMPONENT)}; {missing} lack.")
    known = spectra.to_pandas()
    rows = _rows(known, components)
    for place in components.loc[rows < 0, COMPONENT].itertuples(index=False):
        raise _unknown(spectra, *place)
    block = known.groupby([*COMPONENT[:3], "block"], sort=False).ngroup().to_numpy()
    members = known[np.isin(block, block[rows])]
    number = np.unique(block[members.index], return_inverse=True)[1]
    members = members.assign(number=number).reset_index(drop=True)
    table = members.drop_duplicates("number", ignore_index=True)
    names = [
        node_name(*place) for place in table[[*COMPONENT, "block_size"]].itertuples(index=False)
    ]
    table = table.assign(node=names, size=table["block_size"])
    return Nodes(
        spectra, table[["node", *COMPONENT, "size", "sigma"]], members[[*COMPONENT, "number"]]
    )


def _rows(known: pd.DataFrame, components: pd.DataFrame) -> np.ndarray:
    """Row of each component in a table, −1 where it is not there."""
    index = pd.MultiIndex.from_frame(known[COMPONENT])
    return index.get_indexer(pd.MultiIndex.from_frame(components[COMPONENT]))


def _unknown(spectra: Spectra, layer: int, kind: str, head: int, index: int) -> ValueError:
    name = f"blocks.{layer}.{kind}"
    if name not in spectra:
        return ValueError(
            f"{name} is not decomposed; there are {', '.join(list(spectra)[:4])}, … "
            "Call decompose with this matrix and layer."
        )
    heads, rank = spectra[name].sigma.shape
    return ValueError(
        f"{name} has heads 0 to {heads - 1} and indices 0 to {rank - 1}; "
        f"there is no head {head}, index {index}."
    )


def node_name(layer: int, kind: str, head: int, first: int, size: int = 1) -> str:
    """``L1.W_O[2,13]``: layer, matrix, head and index; MLP maps have no head."""
    index = f"{first}" if size == 1 else f"{first}–{first + size - 1}"
    place = index if kind in MLP_KINDS else f"{head},{index}"
    return f"L{layer}.{kind}[{place}]"


def short_name(matrix: str) -> str:
    """``blocks.1.W_O`` as ``L1.W_O``; other names as they are."""
    return "L" + matrix.removeprefix("blocks.") if matrix.startswith("blocks.") else matrix


def score_rows(scores: Scores, components: pd.DataFrame) -> np.ndarray:
    """Row of each component in ``scores``.

    Raises:
        ValueError: one that was not scored.
    """
    rows = _rows(scores.components, components)
    for place in components.loc[rows < 0, COMPONENT].to_dict("records"):
        raise ValueError(f"The scores do not hold the component {place}.")
    return rows
