"""How much of what one component writes another one reads, from the weights alone.

``cos(v_w ∘ γ, u_r)`` across layers, with the reader's norm up to its scale; ``v_w · u_r`` inside a
head (``W_V`` → ``W_O``) and inside an MLP (``W_in``, ``W_gate`` → ``W_out``). The sign is that of
the pair of coordinates: with a score above zero, a rising coordinate of the writer raises that of
the reader. For a degenerate block the score is the largest principal cosine, which has no sign.
``QK`` reads on two sides, that of the query and that of the key.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.nodes import Node, make_nodes, node_name
from eigenlens.circuits.norms import gain_before
from eigenlens.circuits.residual import (
    Rows,
    at_norm_one,
    own_rows,
    read_rows,
    stream_writes,
    write_rows,
)
from eigenlens.far_side import output_vectors, unit
from eigenlens.matrices import Site
from eigenlens.spectra import Spectra, Spectrum

_STREAM = ("W_V", "W_O", "W_out")
_READERS = ("W_Q", "W_K", "W_V", "W_in", "W_gate", "QK", "OV")
_COLUMNS = ["writer", "reader", "side", "through", "score"]


def composition(
    model: TransformerBridge,
    spectra: Spectra,
    writers: pd.DataFrame,
    readers: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Composition scores of every writer with every reader that comes after it.

    Args:
        model: gives norms and the maps in between.
        spectra: its decomposition, or that of another object with the same weights.
        writers: components (``layer, matrix, head, index``), as in a ``FrozenSet``'s table.
        readers: components; the writers themselves by default.

    Returns:
        Columns ``writer, reader, side, through, score``, the largest magnitude first; ``side`` is
        ``query`` or ``key`` where a ``QK`` reads and else empty, ``through`` the query head through
        which a ``W_V`` writes.

    Raises:
        ValueError: components that the decomposition does not have; spectra of other weights.
    """
    spectra = spectra.on(model)
    sending = make_nodes(spectra, writers)
    receiving = sending if readers is None else make_nodes(spectra, readers)
    places, found = [], []
    for writer in sending:
        own, stream = own_rows(model, writer)[1], write_rows(model, writer)
        for reader in receiving:
            for side, through, written, read in _meeting(model, writer, own, stream, reader):
                places.append((writer.name, reader.name, side, through))
                found.append(cosine(written.to(read), read))
    # One wait for the device, not one for every pair.
    scores = torch.stack([c.to(found[0].device) for c in found]).tolist() if found else []
    table = pd.DataFrame(places, columns=_COLUMNS[:-1]).assign(score=scores)
    return table.sort_values("score", key=abs, ascending=False, ignore_index=True)


def _meeting(
    model: TransformerBridge, writer: Node, own: Rows, stream: dict[int, Rows], reader: Node
) -> Iterator[tuple[str, int, Rows, Rows]]:
    """Side, query head, what is written and what is read wherever the two meet."""
    if inside(writer.site, writer.head, reader.site, reader.head):
        yield "", reader.head, own, own_rows(model, reader)[0]
    elif comes_after(model, writer.site, reader.site):
        norm = gain_before(model, reader.site.find(model))
        for side, read in stream_reads(model, reader).items():
            for through, rows in stream.items():
                yield side, through, norm(rows), read


def stream_reads(model: TransformerBridge, reader: Node) -> dict[str, Rows]:
    """Directions of :func:`read_rows` that reach the reader without another map of the basis."""
    return read_rows(model, reader) if reader.site.kind in _READERS else {}


def inside(writer: Site, w_head: int, reader: Site, r_head: int) -> bool:
    """Whether writer and reader meet inside one head or one MLP."""
    if writer.layer != reader.layer:
        return False
    if writer.kind == "W_V" and reader.kind == "W_O":
        return r_head // (reader.n_heads // writer.n_heads) == w_head
    return writer.kind in ("W_in", "W_gate") and reader.kind == "W_out"


def comes_after(model: TransformerBridge, writer: Site, reader: Site) -> bool:
    """Whether the reader sees through the residual stream what the writer wrote to it."""
    if writer.matrix not in _STREAM or reader.kind not in _READERS:
        return False
    if writer.layer != reader.layer:
        return writer.layer < reader.layer
    parallel = bool(getattr(model.cfg, "parallel_attn_mlp", False))
    return writer.matrix != "W_out" and reader.kind in ("W_in", "W_gate") and not parallel


def cosine(written: Float[Tensor, "n width"], read: Float[Tensor, "m width"]) -> Float[Tensor, ""]:
    """Cosine of two directions; of two sets of directions the largest principal cosine."""
    product = at_norm_one(written) @ at_norm_one(read).T
    return product[0, 0] if product.numel() == 1 else torch.linalg.matrix_norm(product, 2)


def reads_from(model: TransformerBridge, spectra: Spectra, reader: Node, top: int) -> pd.DataFrame:
    """The components of a whole decomposition that a node reads most: ``writer, side, score``.

    All components of a matrix are compared at once, and only the ``top`` of all get a name.
    """
    norm = gain_before(model, reader.site.find(model))
    own, stream = own_rows(model, reader)[0], stream_reads(model, reader)
    parts = []
    for writer in spectra.values():
        site = writer.site
        heads = np.arange(site.n_heads)
        near = heads[[inside(site, head, reader.site, reader.head) for head in range(len(heads))]]
        if len(near):
            written, reads = output_vectors(model, writer)[near], {"": own}
        elif comes_after(model, site, reader.site):
            vectors = output_vectors(model, writer)
            through, written = stream_writes(model, site.find(model), vectors, heads)
            written, reads = norm(written), stream
            near = np.repeat(heads, len(through) // len(heads))
        else:
            continue
        parts += [
            _cosines(writer, near, written.to(read), at_norm_one(read)).assign(side=side)
            for side, read in reads.items()
        ]
    if not parts:
        return pd.DataFrame(columns=["writer", "side", "score"])
    table = pd.concat(parts).sort_values("score", key=abs, ascending=False, kind="stable")
    table = table.head(top).reset_index(drop=True)
    names = [
        node_name(spectra[name].site.layer, spectra[name].site.kind, *place)
        for name, *place in table[["name", "head", "first", "size"]].itertuples(index=False)
    ]
    return table.assign(writer=names)[["writer", "side", "score"]]


def _cosines(
    writer: Spectrum, heads: np.ndarray, written: Float[Tensor, "n k width"], read: Rows
) -> pd.DataFrame:
    """Cosines of the components, and degenerate blocks, of these heads with what is read."""
    single = unit(written) @ read.T
    score = (single[..., 0] if len(read) == 1 else single.norm(dim=-1)).flatten()
    block = writer.blocks.cpu().numpy()[heads]
    start = np.flatnonzero(np.diff(block, axis=1, prepend=-1))
    size = np.diff(np.append(start, block.size))
    flat = written.flatten(0, 1)
    for place, n in zip(start[size > 1], size[size > 1], strict=True):
        score[place] = cosine(flat[place : place + n], read)
    return pd.DataFrame(
        {
            "name": writer.name,
            "head": heads[start // block.shape[1]],
            "first": start % block.shape[1],
            "size": size,
            "score": score.cpu().double().numpy()[start],
        }
    )
