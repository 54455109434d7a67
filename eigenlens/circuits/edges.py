"""First-order effects along single edges, summed over the data.

Writer w has the projected activation ``a_w``; freezing it puts ``ā_w`` in place. If only reader r
sees that, the loss changes to first order by

    ``mean_b Σ_t (ā_w − a_w) · σ_r (v_w J_wr u_r) · g_r``,   ``g_r = v_r · ∂L/∂y``

where ``J_wr`` is the direct path between the two: for the residual stream the norm before the
reader (``v_w ∘ γ / scale_t``), inside a head the attention pattern, its softmax for ``W_Q`` and
``W_K``, inside an MLP the derivative of the activation. It is taken by autograd through
:mod:`eigenlens.circuits.cut_graph`. Negative: taking that path away lowers the loss.

Cost per batch: two forward passes and one backward pass, and one short backward pass through the
direct paths for every reader and every map.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.cut_graph import (
    EMBED_HOOK,
    CutGraph,
    Hooks,
    Norm,
    RunGradients,
    cut_graph,
    run_gradients,
)
from eigenlens.circuits.nodes import EMBED, LOGITS, Directions, Nodes, directions, means_at
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import WeightMatrices
from eigenlens.metrics import Metric, answer_logits, precise
from eigenlens.scoring.scorer import position_counts, position_range, position_rows
from eigenlens.spectra import Spectra
from eigenlens.tasks.batches import Batch

AnswerTarget = Callable[[Tensor, Tensor], Tensor]
ANSWER_TARGETS: dict[str, AnswerTarget] = {
    "answer_logit": lambda logits, right: right - logits.mean(-1),
    "answer_logprob": lambda logits, right: right - logits.logsumexp(-1),
}
_INSIDE = {"W_O": ("W_Q", "W_K", "W_V"), "W_out": ("W_in", "W_gate")}


@dataclass
class EdgeSums:
    """Sums over examples, in nats; ``target`` is a reader node, a whole map, or the logits.

    Attributes:
        targets: names of the targets: nodes, then maps, then ``logits``.
        total: ``Σ_b`` of the effect of each writer through each target.
        square: ``Σ_b`` of its square.
        by_position: ``Σ_b`` by the writer's position.
        inflow: ``Σ_b`` of the effect of every whole map through each node, ``[node, map]``.
        own: ``Σ_b`` of the first-order effect of freezing the writer for all.
        direct: ``Σ_b`` of what the writer's deviation from its mean adds, through its own block's
            ``W_O`` or ``W_out`` and on directly, to each of :data:`ANSWER_TARGETS`.
        positions: of the last axis of ``by_position``.
        n_examples: examples summed.
    """

    targets: list[str]
    total: np.ndarray
    square: np.ndarray
    by_position: np.ndarray
    inflow: np.ndarray
    own: np.ndarray
    direct: np.ndarray
    positions: range
    n_examples: int = 0


@dataclass
class _Run:
    """What stays the same from batch to batch."""

    model: TransformerBridge
    maps: WeightMatrices
    nodes: Nodes
    known: FrozenSet
    metric: Metric
    norm: Norm
    sums: EdgeSums
    means: dict[str, Float[Tensor, "pos width"]]
    directions: dict[str, Directions] = field(default_factory=dict)


def sum_edges(
    model: TransformerBridge,
    spectra: Spectra,
    maps: WeightMatrices,
    nodes: Nodes,
    known: FrozenSet,
    batches: Sequence[Batch],
    *,
    metric: Metric,
    norm: Norm,
    reference: str,
    progress: bool,
) -> EdgeSums:
    """Sum the effects of all nodes and the embedding through all nodes, maps and the logits.

    Args:
        model: in eval mode.
        spectra: the decomposition.
        maps: every map of the model.
        nodes: writers and readers.
        known: the mean activations of ``nodes.members``, row by row.
        batches: the data.
        metric: a number per example.
        norm: see :func:`eigenlens.circuits.cut_graph.cut_graph`.
        reference: ``"zero"`` puts zero in place of the embedding, anything else its mean.
        progress: show a progress bar.
    """
    positions = position_range(batches)
    targets = [*nodes.table["node"], *(m.name for m in maps), LOGITS]
    shape = (len(targets), len(nodes) + 1)
    sums = EdgeSums(
        targets=targets,
        total=np.zeros(shape),
        square=np.zeros(shape),
        by_position=np.zeros((*shape, len(positions))),
        inflow=np.zeros((len(nodes), len(maps))),
        own=np.zeros(shape[1]),
        direct=np.zeros((len(ANSWER_TARGETS), shape[1])),
        positions=positions,
    )
    means = _output_means(model, maps, batches, positions, zero=reference == "zero")
    run = _Run(model, maps, nodes, known, metric, norm, sums, means)
    for name in nodes.maps:
        run.directions[name] = directions(spectra, nodes.members.iloc[nodes.on(name)])
    for batch in tqdm(batches, desc="edges", unit="batch", disable=not progress):
        _add_batch(run, batch)
    return sums


def _output_means(
    model: TransformerBridge,
    maps: WeightMatrices,
    batches: Sequence[Batch],
    positions: range,
    *,
    zero: bool,
) -> dict[str, Float[Tensor, "pos width"]]:
    """Mean output of every map and of the embedding, per position; what is left at zero input."""
    if zero:
        biases = {m.name: m.bias for m in maps if m.bias is not None}
        return {name: bias.expand(len(positions), -1) for name, bias in biases.items()}
    totals: dict[str, Tensor] = {}
    for batch in batches:
        add = partial(_add_output, totals, batch, positions)
        hooks: Hooks = [(EMBED_HOOK, partial(add, EMBED))]
        hooks += [(m.hook_out, partial(add, m.name)) for m in maps]
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            answer_logits(model, batch)
    count = position_counts(batches, positions)[:, None]
    return {name: total / count.clamp_min(1).to(total) for name, total in totals.items()}


def _add_output(
    totals: dict[str, Tensor], batch: Batch, positions: range, name: str, value: Tensor, hook: Any
) -> None:
    """Hook that adds a map's output to its sum per position."""
    summed = torch.where(batch.attention_mask[..., None], value.flatten(2), 0).double().sum(0)
    if name not in totals:
        totals[name] = summed.new_zeros(len(positions), summed.shape[1])
    totals[name].index_add_(0, position_rows(batch, positions), summed)


def _add_batch(run: _Run, batch: Batch) -> None:
    real = run_gradients(run.model, run.maps, batch, run.metric)
    graph = cut_graph(run.model, run.maps, batch, run.norm)
    moves, whole = _moves(run, batch, real), _whole_moves(run, batch, graph)
    for place, (output, cotangent) in enumerate(_targets(run, batch, real, graph)):
        is_node = place < len(run.nodes)
        gradients = graph.pull(output, cotangent, whole if is_node else [EMBED, *run.directions])
        _record(run, batch, place, _effects(run, whole[EMBED], moves, gradients))
        for column, matrix in enumerate(run.maps) if is_node else ():
            if matrix.name in gradients:
                effect = (whole[matrix.name] * gradients[matrix.name]).sum(dtype=torch.float64)
                run.sums.inflow[place, column] += float(effect)
    own = _effects(run, whole[EMBED], moves, real.gradients)
    run.sums.own += own.sum((0, 1)).cpu().numpy()
    for row, target in enumerate(ANSWER_TARGETS.values()):
        direct = _effects(run, whole[EMBED], moves, _direct_gradients(run, batch, graph, target))
        run.sums.direct[row] -= direct.sum((0, 1)).cpu().numpy()
    run.sums.n_examples += len(batch)


def _moves(run: _Run, batch: Batch, real: RunGradients) -> dict[str, Float[Tensor, "batch pos k"]]:
    """``ā − a`` of the chosen components of each map; zero at padding."""
    means = means_at(run.known, batch.positions)
    moves = {}
    for name, own in run.directions.items():
        a = real.inputs[name].to(own.reads) @ own.reads
        mean = means[:, torch.as_tensor(run.nodes.on(name))].to(a)
        moves[name] = torch.where(batch.attention_mask[..., None], mean - a, 0)
    return moves


def _whole_moves(
    run: _Run, batch: Batch, graph: CutGraph
) -> dict[str, Float[Tensor, "batch pos width"]]:
    """Mean minus value of the output of every map, and of the embedding; zero at padding."""
    rows = position_rows(batch, run.sums.positions)
    moves = {}
    for name, leaf in graph.leaves.items():
        value = leaf.detach().flatten(2)
        mean = run.means[name][rows].to(value) if name in run.means else 0
        moves[name] = torch.where(batch.attention_mask[..., None], mean - value, 0)
    return moves


def _targets(
    run: _Run, batch: Batch, real: RunGradients, graph: CutGraph
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Outputs to pull back and their cotangents, in the order of ``sums.targets``."""
    for number in range(len(run.nodes)):
        member = np.flatnonzero(run.nodes.members["number"] == number)
        name = run.nodes.members["map"].iloc[member[0]]
        inside = torch.as_tensor(np.isin(run.nodes.on(name), member))
        own, x = run.directions[name], graph.inputs[name]
        g = real.gradients[name].to(own.writes) @ own.writes[inside].T
        yield x, (g @ own.reads[:, inside].T).to(x).view_as(x)
    for matrix in run.maps:
        x = graph.inputs[matrix.name]
        g = real.gradients[matrix.name] @ matrix.flat_weight.T
        yield x, g.to(x).view_as(x)
    yield run.metric(precise(graph.logits), batch).sum(), None


def _effects(
    run: _Run,
    embed: Float[Tensor, "batch pos d_model"],
    moves: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> Float[Tensor, "batch pos writer"]:
    """``(ā_w − a_w) · (v_w · gradient)`` of every node, the embedding last."""
    shape = (*embed.shape[:2], len(run.nodes) + 1)
    effects = embed.new_zeros(shape, dtype=torch.float64)
    for name, own in run.directions.items():
        if name in gradients:
            each = moves[name] * (gradients[name].to(own.writes) @ own.writes.T)
            number = torch.as_tensor(run.nodes.members["number"].to_numpy()[run.nodes.on(name)])
            effects.index_add_(2, number.to(embed.device), each.double())
    if EMBED in gradients:
        effects[..., -1] = (embed * gradients[EMBED]).sum(-1).double()
    return effects


def _record(run: _Run, batch: Batch, place: int, effects: Tensor) -> None:
    sums = run.sums
    example = effects.sum(1)
    sums.total[place] += example.sum(0).cpu().numpy()
    sums.square[place] += example.square().sum(0).cpu().numpy()
    rows = position_rows(batch, sums.positions).cpu().numpy()
    sums.by_position[place][:, rows] += effects.sum(0).T.cpu().numpy()


def _direct_gradients(
    run: _Run, batch: Batch, graph: CutGraph, target: AnswerTarget
) -> dict[str, Tensor]:
    """Gradient of a target of the first answer token by every map's output, by direct paths.

    Paths lead from a map through its own block's ``W_O`` or ``W_out``, where it does not write the
    residual stream itself, and from there to the logits past all later maps.
    """
    first = graph.logits[:, 0]
    right = first.gather(-1, batch.answer[:, :1])[:, 0]
    writing = [m for m in run.maps if m.kind in _INSIDE]
    found = graph.pull(target(first, right).sum(), None, [EMBED, *(m.name for m in writing)])
    for matrix in writing:
        inner = [f"blocks.{matrix.layer}.{kind}" for kind in _INSIDE[matrix.kind]]
        wanted = [name for name in inner if name in run.directions]
        if wanted and matrix.name in found:
            x = graph.inputs[matrix.name]
            gradient = (found[matrix.name] @ matrix.flat_weight.T).view_as(x)
            found |= graph.pull(x, gradient, wanted)
    return found
