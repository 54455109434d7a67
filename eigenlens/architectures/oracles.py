"""Scores and freezing against the weights themselves, in float64.

0. The bridge computes the logits that transformers computes.
1. A score under the reference ``zero`` is ``−σ ∂L/∂σ``, by autograd through the weights.
2. Freezing under means of zero is an edit of the weights: ``W − Σ E_i``.
3. Padding changes nothing: an example has the same loss alone and in a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.decomposition import decompose
from eigenlens.evaluation import evaluate
from eigenlens.freezing import freeze
from eigenlens.matrices import WeightMatrix, split_heads, weight_matrices
from eigenlens.metrics import answer_logits, answer_loss
from eigenlens.scoring import Scores, score
from eigenlens.selection import select
from eigenlens.spectra import by_matrix
from eigenlens.tasks import make_batches

TOLERANCE = 1e-7  # of the largest value
Parts = Float[Tensor, "head k d_in d_out"]


class Inexact(Exception):
    """An oracle and the product disagree; says which and where."""


def check_exact(model: TransformerBridge, data: Dataset) -> None:
    """Try everything that ``weight_matrices(model, skip_unsupported=True)`` lists.

    Raises:
        Inexact: an oracle disagrees, or a map plays no part in what the model computes.
    """
    maps = weight_matrices(model, skip_unsupported=True)
    parts = {m.name: _parts(m) for m in maps}
    spectra = decompose(model, skip_unsupported=True, cache=False, progress=False)
    scores = score(model, spectra, data, reference="zero", batch_size=2, progress=False)
    _check_scores(scores, minus_sigma_gradient(model, maps, parts, data))
    _check_freezing(model, maps, parts, scores, data)
    one, many = (evaluate(model, data, batch_size=n, progress=False) for n in (1, len(data)))
    losses = [e.examples["loss"].to_numpy() for e in (one, many)]
    _agree("losses with and without padding", *losses)


def check_same_logits(found: Tensor, wanted: Tensor) -> None:
    """Raise ``Inexact`` where the bridge computes something else than transformers."""
    _agree("logits of the bridge and of transformers", found.numpy(), wanted.numpy())


def _agree(what: str, found: np.ndarray, wanted: np.ndarray) -> None:
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    if not error < TOLERANCE:
        raise Inexact(f"{what} differ by {error:.0e}")


def _parts(matrix: WeightMatrix) -> Parts:
    """``σ_i u_i v_iᵀ`` of LAPACK."""
    u, s, vh = torch.linalg.svd(matrix.weight, full_matrices=False)
    return einsum(u, s, vh, "head i k, head k, head k o -> head k i o")


def _check_scores(scores: Scores, wanted: dict[str, np.ndarray]) -> None:
    largest = max(np.abs(values).max() for values in wanted.values())
    rows = by_matrix(scores.components)
    for name, values in wanted.items():
        if not np.abs(values).max() > 1e-12 * largest:
            raise Inexact(f"{name} plays no part in the loss")
        if not np.abs(scores.delta_loss[rows[name]] - values).max() < TOLERANCE * largest:
            raise Inexact(f"scores of {name} are not −σ ∂L/∂σ")


def minus_sigma_gradient(
    model: TransformerBridge,
    maps: Sequence[WeightMatrix],
    parts: dict[str, Parts],
    data: Dataset,
) -> dict[str, np.ndarray]:
    """``−σ_i ∂L/∂σ_i`` of the mean loss, by autograd through the weights themselves."""
    weights = [m.parameter for m in maps]
    model.requires_grad_(True)
    try:
        with torch.enable_grad():
            losses = [answer_loss(answer_logits(model, b), b) for b in make_batches(data, model, 2)]
            grads = torch.autograd.grad(torch.cat(losses).mean(), weights, allow_unused=True)
    finally:
        model.requires_grad_(False)
    found = {}
    for m, weight, grad in zip(maps, weights, grads, strict=True):
        flat = m.flat(torch.zeros_like(weight) if grad is None else grad)
        per_head = split_heads(flat, m.n_heads, m.head_axis)
        slopes = einsum(parts[m.name], per_head, "head k i o, head i o -> head k")
        found[m.name] = -slopes.flatten().numpy()
    return found


def _check_freezing(
    model: TransformerBridge,
    maps: Sequence[WeightMatrix],
    parts: dict[str, Parts],
    scores: Scores,
    data: Dataset,
) -> None:
    """Half of the components, frozen by hooks and taken off the weights."""
    frozen = select(scores, 0.5)
    before = _logits(model, data)
    with freeze(model, frozen):
        found = _logits(model, data)
    rows = by_matrix(frozen.components)
    kept = {m.name: m.weight.clone() for m in maps}
    try:
        for m in maps:
            table = frozen.components.iloc[rows.get(m.name, [])]
            for head, index in zip(table["head"], table["index"], strict=True):
                m.weight[head] -= parts[m.name][head, index]
        wanted = _logits(model, data)
    finally:
        for m in maps:
            m.weight.copy_(kept[m.name])
    if not np.abs(wanted - before).max() > 1e-6 * np.abs(before).max():
        raise Inexact("an edit of the weights changes nothing")
    _agree("logits of frozen and of edited weights", found, wanted)


def _logits(model: TransformerBridge, data: Dataset) -> np.ndarray:
    with torch.no_grad():
        batches = make_batches(data, model, 2)
        return np.concatenate([answer_logits(model, b).numpy().ravel() for b in batches])
