"""How much of what one component writes another one reads, from the weights alone.

``cos(v_w ∘ γ, u_r)`` across layers, with the reader's norm up to its scale; ``v_w · u_r`` inside a
head (``W_V`` → ``W_O``) and inside an MLP (``W_in``, ``W_gate`` → ``W_out``). The sign is that of
the pair of activations: with a score above zero, a positive activation of the writer raises that of
the reader. For a degenerate block the score is the largest principal cosine, which has no sign.
"""

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.nodes import Nodes, make_nodes
from eigenlens.circuits.residual import READERS, own_rows, seen_by, unit, write_rows
from eigenlens.matrices import WeightMatrix
from eigenlens.spectra import Spectra, Spectrum

_STREAM = ("W_V", "W_O", "W_out")
_COLUMNS = ["writer", "reader", "through", "score"]


def composition(
    model: TransformerBridge,
    spectra: Spectra,
    writers: pd.DataFrame,
    readers: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Composition scores of every writer with every reader that comes after it.

    Args:
        model: gives norms and the maps in between.
        spectra: its decomposition.
        writers: components (``layer, matrix, head, index``), as in a ``FrozenSet``'s table.
        readers: components; the writers themselves by default.

    Returns:
        Columns ``writer, reader, through, score``, the largest magnitude first; ``through`` is the
        query head through which a ``W_V`` writes.

    Raises:
        ValueError: components that the decomposition does not have.
    """
    sending = make_nodes(spectra, writers)
    receiving = sending if readers is None else make_nodes(spectra, readers)
    rows = [
        {"writer": w, "reader": r, "through": through, "score": score}
        for w, writer, w_place in _each(spectra, sending)
        for r, reader, r_place in _each(spectra, receiving)
        for through, score in _pair(model, writer, w_place, reader, r_place).items()
    ]
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return table.sort_values("score", key=abs, ascending=False, ignore_index=True)


def _each(spectra: Spectra, nodes: Nodes) -> list[tuple[str, Spectrum, tuple[int, list[int]]]]:
    found = []
    for number, name in enumerate(nodes.table["node"]):
        own = nodes.members[nodes.members["number"] == number]
        place = (int(own["head"].iloc[0]), own["index"].tolist())
        found.append((name, spectra[own["map"].iloc[0]], place))
    return found


def _pair(
    model: TransformerBridge,
    writer: Spectrum,
    w_place: tuple[int, list[int]],
    reader: Spectrum,
    r_place: tuple[int, list[int]],
) -> dict[int, float]:
    u, _ = own_rows(reader, *r_place)
    if inside(model, writer.matrix, w_place[0], reader.matrix, r_place[0]):
        _, v = own_rows(writer, *w_place)
        return {r_place[0]: cosine(v, u)}
    if not comes_after(model, writer.matrix, reader.matrix):
        return {}
    written = write_rows(model, writer, *w_place)
    return {h: cosine(seen_by(model, reader.matrix, rows), u) for h, rows in written.items()}


def inside(
    model: TransformerBridge, writer: WeightMatrix, w_head: int, reader: WeightMatrix, r_head: int
) -> bool:
    """Whether writer and reader meet inside one head or one MLP."""
    if writer.layer != reader.layer:
        return False
    if writer.kind == "W_V" and reader.kind == "W_O":
        return r_head // (reader.n_heads // writer.n_heads) == w_head
    return writer.kind in ("W_in", "W_gate") and reader.kind == "W_out"


def comes_after(model: TransformerBridge, writer: WeightMatrix, reader: WeightMatrix) -> bool:
    """Whether the reader sees through the residual stream what the writer wrote to it."""
    if writer.kind not in _STREAM or reader.kind not in READERS:
        return False
    if writer.layer != reader.layer:
        return writer.layer < reader.layer
    parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
    return writer.kind != "W_out" and reader.kind in ("W_in", "W_gate") and not parallel


def cosine(written: Float[Tensor, "n width"], read: Float[Tensor, "m width"]) -> float:
    """Cosine of two directions; of two sets of directions the largest principal cosine."""
    product = unit(written) @ unit(read).T
    if product.numel() == 1:
        return float(product)
    return float(torch.linalg.matrix_norm(product, 2))
