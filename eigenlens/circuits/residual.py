"""What a node reads from the residual stream and writes to it, as rows of ``[d_model]``.

A map that does not touch the stream is followed to the one that does, by weights alone: ``W_V``
writes through ``W_O`` of the query heads that it feeds, ``W_O`` and ``OV`` read through ``W_V`` of
their head, ``W_in`` and ``W_gate`` write through ``W_out``, and ``W_out`` reads through ``W_in``.
Attention patterns count as given, and derivatives of activation functions as one. ``QK`` reads the
stream twice: what its coordinate is of the query's, and through ``W_K`` what it is multiplied with
of the key's, turned by the rotary embedding of their distance.
"""

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.nodes import Node
from eigenlens.circuits.norms import gain_after
from eigenlens.circuits.rotary import turns
from eigenlens.far_side import unit
from eigenlens.matrices import WeightMatrix, map_of

Rows = Float[Tensor, "_ _"]  # directions of one space, one a row
WRITERS = ("W_O", "W_out")


def head_rows(model: TransformerBridge, node: Node) -> tuple[Rows, Rows]:
    """What a node reads and writes, in the spaces of its own map and head: ``E_i = r_i w_i``."""
    matrix, ends = node.site.find(model), node.ends(model)
    reads, writes = ends.reads.T, ends.writes
    if matrix.head_axis == "in":
        reads = rearrange(reads, "n (head width) -> head n width", head=matrix.n_heads)[node.head]
    if matrix.head_axis == "out":
        writes = rearrange(writes, "n (head width) -> head n width", head=matrix.n_heads)[node.head]
    return reads, writes


def own_rows(model: TransformerBridge, node: Node) -> tuple[Rows, Rows]:
    """The same at length one: ``u_i`` and ``v_i`` in the singular basis."""
    reads, writes = head_rows(model, node)
    return unit(reads), unit(writes)


def read_rows(model: TransformerBridge, node: Node, distance: int = 0) -> dict[str, Rows]:
    """Directions that a node reads behind the norm before it: ``query`` and ``key`` of ``QK``.

    Of the others there is one set, under an empty name. The key stands ``distance`` tokens before
    the query.
    """
    site = node.site
    u, v = own_rows(model, node)
    if site.matrix == "W_O":
        values = map_of(model, site.layer, "W_V")
        return {"": u @ weight_of(values, u)[node.head * values.n_heads // site.n_heads].mT}
    if site.kind == "W_out":
        return {"": u @ weight_of(map_of(model, site.layer, "W_in"), u)[0].mT}
    if site.kind == "QK":
        keys = map_of(model, site.layer, "W_K")
        key = weight_of(keys, v)[node.head * keys.n_heads // site.n_heads]
        return {"query": u, "key": v @ turns(model, site.layer, distance, v) @ key.mT}
    return {"": u}


def write_rows(model: TransformerBridge, node: Node) -> dict[int, Rows]:
    """Directions that a node adds to the residual stream, by query head.

    ``W_Q``, ``W_K`` and ``QK`` move attention and write nothing by themselves: empty.
    """
    _, v = own_rows(model, node)
    through, rows = stream_writes(model, node.site.find(model), v[None], np.array([node.head]))
    return dict(zip(through.tolist(), rows, strict=True))


def stream_writes(
    model: TransformerBridge,
    matrix: WeightMatrix,
    v: Float[Tensor, "head n d_out"],
    heads: np.ndarray,
) -> tuple[np.ndarray, Float[Tensor, "through n d_model"]]:
    """What directions of a map's output in these heads add to the residual stream.

    Returns:
        The query heads that they pass, those of the first head first, and the rows.
    """
    if matrix.kind in WRITERS:
        return heads, gain_after(model, matrix)(v)
    if matrix.kind == "W_V":
        out = map_of(model, matrix.layer, "W_O")
        each = out.n_heads // matrix.n_heads
        heads = (heads[:, None] * each + np.arange(each)).flatten()
        v = v.repeat_interleave(each, dim=0)
    elif matrix.kind in ("W_in", "W_gate"):
        out = map_of(model, matrix.layer, "W_out")
    else:
        return heads[:0], v[:0]
    return heads, gain_after(model, out)(v @ weight_of(out, v)[heads])


def at_norm_one(rows: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """Rows at spectral norm one; a single row at length one. Zero stays zero."""
    largest = torch.linalg.matrix_norm(rows, 2)
    return rows / largest.clamp_min(torch.finfo(rows.dtype).tiny)


def weight_of(matrix: WeightMatrix, like: Tensor) -> Float[Tensor, "head d_in d_out"]:
    """Its weight as numbers of the type, and at the place, of ``like``."""
    return matrix.weight.detach().to(like)
