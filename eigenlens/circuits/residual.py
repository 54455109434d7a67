"""What a node reads from the residual stream and writes to it, as rows of ``[d_model]``.

A map that does not touch the stream is followed to the one that does, by weights alone: ``W_V``
writes through ``W_O`` of the query heads that it feeds, ``W_O`` reads through ``W_V`` of its head,
``W_in`` and ``W_gate`` write through ``W_out``, and ``W_out`` reads through ``W_in``. Attention
patterns count as given, and derivatives of activation functions as one.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.norms import gain_after, gain_before
from eigenlens.matrices import WeightMatrix, weight_matrices
from eigenlens.spectra import Spectrum

Rows = Float[Tensor, "n d_model"]
READERS = ("W_Q", "W_K", "W_V", "W_in", "W_gate")
WRITERS = ("W_O", "W_out")


def own_rows(
    spectrum: Spectrum, head: int, indices: list[int]
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
    """``u_i`` and ``v_i`` of a node as rows, in the spaces of its own map."""
    return spectrum.u[head][:, indices].T, spectrum.vh[head][indices]


def query_heads(model: TransformerBridge, matrix: WeightMatrix, head: int) -> list[int]:
    """Query heads that a (key/value) head of ``matrix`` serves."""
    group = model.cfg.n_heads // matrix.n_heads
    return list(range(head * group, (head + 1) * group))


def read_rows(model: TransformerBridge, spectrum: Spectrum, head: int, indices: list[int]) -> Rows:
    """Directions that a node reads, in the space after the norm before it."""
    matrix = spectrum.matrix
    u, _ = own_rows(spectrum, head, indices)
    if matrix.kind == "W_O":
        values = _map(model, matrix.layer, "W_V")
        own = head // (matrix.n_heads // values.n_heads)
        return u @ values.weight[own].T.to(u)
    if matrix.kind == "W_out":
        return u @ _map(model, matrix.layer, "W_in").weight[0].T.to(u)
    return u


def write_rows(
    model: TransformerBridge, spectrum: Spectrum, head: int, indices: list[int]
) -> dict[int, Rows]:
    """Directions that a node adds to the residual stream, by query head.

    ``W_Q`` and ``W_K`` move attention and write nothing by themselves: empty.
    """
    matrix = spectrum.matrix
    _, v = own_rows(spectrum, head, indices)
    if matrix.kind in WRITERS:
        return {head: gain_after(model, matrix)(v)}
    if matrix.kind == "W_V":
        out = _map(model, matrix.layer, "W_O")
        after, served = gain_after(model, out), query_heads(model, matrix, head)
        return {h: after(v @ out.weight[h].to(v)) for h in served}
    if matrix.kind in ("W_in", "W_gate"):
        out = _map(model, matrix.layer, "W_out")
        return {0: gain_after(model, out)(v @ out.weight[0].to(v))}
    return {}


def seen_by(model: TransformerBridge, matrix: WeightMatrix, rows: Rows) -> Rows:
    """Residual directions as the norm before ``matrix`` passes them on."""
    reader = matrix
    if matrix.kind in WRITERS:
        reader = _map(model, matrix.layer, "W_V" if matrix.kind == "W_O" else "W_in")
    return gain_before(model, reader)(rows)


def unit(rows: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """Rows at spectral norm one; a single row at length one. Zero stays zero."""
    largest = torch.linalg.matrix_norm(rows, 2)
    return rows / largest.clamp_min(torch.finfo(rows.dtype).tiny)


def _map(model: TransformerBridge, layer: int, kind: str) -> WeightMatrix:
    return weight_matrices(model, [kind], [layer])[0]
