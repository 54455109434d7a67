"""First-order effects along single edges, summed over the data.

Writer w has the coordinate ``c_w``; freezing it puts ``c̄_w`` in place. If only reader r sees that,
the metric changes to first order by

    ``mean_b Σ_t (c̄_w − c_w) · (w_w J_wr r_r) · g_r``,   ``g_r = w_r · ∂L/∂y``

with what a unit of a coordinate adds to its map's output, ``w``, and what it is of the input, ``r``
(:class:`eigenlens.far_side.MapDirections`), and where ``J_wr`` is the direct path between the two:
for the residual stream the norm before the reader (``w ∘ γ / scale_t``), inside a head the
attention pattern, its softmax for ``W_Q`` and ``W_K``, inside an MLP the derivative of the
activation. It is taken by autograd through :mod:`eigenlens.circuits.cut_graph`. Negative: taking
that path away lowers the loss.

Cost per batch: two forward passes and one backward pass, and one short backward pass through the
direct paths for every reader and every map.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from eigenlens.circuits.nodes import EMBED, LOGITS, Nodes
from eigenlens.far_side import MapDirections, map_directions
from eigenlens.matrices import WeightMatrices
from eigenlens.metrics import Metric, answer_logits, precise
from eigenlens.passes import without_padding
from eigenlens.position_means import PositionMeans, Positions
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
    positions: Positions
    n_examples: int = 0


@dataclass(frozen=True)
class _Members:
    """The chosen components of one map: their nodes, both sides of each, and their means."""

    map: str
    node: np.ndarray
    ends: MapDirections
    means: PositionMeans


@dataclass(frozen=True)
class _Run:
    """What stays the same from batch to batch."""

    model: TransformerBridge
    maps: WeightMatrices
    members: list[_Members]
    outputs: dict[str, PositionMeans]
    metric: Metric
    norm: Norm
    sums: EdgeSums


@torch.no_grad()
def sum_edges(
    model: TransformerBridge,
    maps: WeightMatrices,
    nodes: Nodes,
    means: PositionMeans,
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
        maps: every map of the model.
        nodes: writers and readers.
        means: of ``nodes.members``, row by row.
        batches: the data.
        metric: a number per example.
        norm: see :func:`eigenlens.circuits.cut_graph.cut_graph`.
        reference: ``"zero"`` puts zero in place of the embedding, anything else its mean, over the
            positions that ``means`` are over.
        progress: show a progress bar.
    """
    positions = Positions.of(batches)
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
    outputs = _output_means(model, maps, batches, reference, means)
    run = _Run(model, maps, _members(model, nodes, means), outputs, metric, norm, sums)
    for batch in tqdm(batches, desc="edges", unit="batch", disable=not progress):
        _add_batch(run, batch)
    return sums


def _members(model: TransformerBridge, nodes: Nodes, means: PositionMeans) -> list[_Members]:
    head, index, number = (nodes.members[n].to_numpy() for n in ("head", "index", "number"))
    return [
        _Members(
            spectrum.site.map_name,
            number[rows],
            map_directions(model, spectrum, head[rows], index[rows]),
            means[rows],
        )
        for spectrum, rows in nodes.by_spectrum()
    ]


def _output_means(
    model: TransformerBridge,
    maps: WeightMatrices,
    batches: Sequence[Batch],
    reference: str,
    like: PositionMeans,
) -> dict[str, PositionMeans]:
    """Mean output of every map and of the embedding; at zero input, the bias where there is one."""
    if reference == "zero":
        biases = {m.name: m.bias.cpu().double().numpy() for m in maps if m.bias is not None}
        return {name: PositionMeans.constant(bias) for name, bias in biases.items()}
    n_positions = like.positions.n_positions
    positions = Positions() if like.is_shared else Positions.of(batches, n_positions)
    totals: dict[str, Tensor] = {}
    for batch in batches:
        add = partial(_add_output, totals, batch, positions)
        hooks: Hooks = [(EMBED_HOOK, partial(add, EMBED))]
        hooks += [(m.hook_out, partial(add, m.name)) for m in maps]
        with model.hooks(fwd_hooks=hooks):
            answer_logits(model, batch)
    count = positions.count(batches)
    return {
        name: PositionMeans.from_sums(positions, total, count) for name, total in totals.items()
    }


def _add_output(
    totals: dict[str, Tensor],
    batch: Batch,
    positions: Positions,
    name: str,
    value: Tensor,
    hook: Any,
) -> None:
    """Hook that adds a map's output to its sum per position."""
    summed = without_padding(value.flatten(2), batch).double().sum(0)
    if name not in totals:
        totals[name] = summed.new_zeros(len(positions) + 1, summed.shape[1])
    totals[name].index_add_(0, positions.of_batch(batch).to(summed.device), summed)


def _add_batch(run: _Run, batch: Batch) -> None:
    real = run_gradients(run.model, run.maps, batch, run.metric)
    graph = cut_graph(run.model, run.maps, batch, run.norm)
    moves, whole = _moves(run, batch, real), _whole_moves(run, batch, graph)
    wanted = [EMBED, *(own.map for own in run.members)]
    for place, (output, cotangent) in enumerate(_targets(run, batch, real, graph)):
        is_node = place < len(run.sums.inflow)
        gradients = graph.pull(output, cotangent, whole if is_node else wanted)
        _record(run.sums, batch, place, _effects(run, whole[EMBED], moves, gradients))
        if is_node:
            run.sums.inflow[place] += _inflow(run, whole, gradients)
    run.sums.own += _summed(_effects(run, whole[EMBED], moves, real.gradients))
    for row, target in enumerate(ANSWER_TARGETS.values()):
        gradients = _direct_gradients(run, batch, graph, target)
        run.sums.direct[row] -= _summed(_effects(run, whole[EMBED], moves, gradients))
    run.sums.n_examples += len(batch)


def moved(
    means: PositionMeans, values: Float[Tensor, "batch pos k"], batch: Batch
) -> Float[Tensor, "batch pos k"]:
    """``c̄ − c`` of components, or of the channels of an activation; zero at padding."""
    mean = torch.tensor(means.at(batch.positions).T).to(values)
    return without_padding(mean - values, batch)


def _moves(run: _Run, batch: Batch, real: RunGradients) -> dict[str, Float[Tensor, "batch pos k"]]:
    """``c̄ − c`` of the chosen components of each map."""
    return {
        own.map: moved(own.means, own.ends.coordinates(real.inputs[own.map]), batch)
        for own in run.members
    }


def _whole_moves(
    run: _Run, batch: Batch, graph: CutGraph
) -> dict[str, Float[Tensor, "batch pos width"]]:
    """Mean minus value of the output of every map, and of the embedding."""
    moves = {}
    for name, leaf in graph.leaves.items():
        value = leaf.detach().flatten(2)
        if name in run.outputs:
            moves[name] = moved(run.outputs[name], value, batch)
        else:
            moves[name] = without_padding(-value, batch)
    return moves


def _targets(
    run: _Run, batch: Batch, real: RunGradients, graph: CutGraph
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Outputs to pull back and their cotangents, in the order of ``sums.targets``."""
    for own in run.members:
        x, reads, writes = graph.inputs[own.map], own.ends.reads, own.ends.writes
        slopes = real.gradients[own.map].to(writes) @ writes.T
        for number in np.unique(own.node):
            inside = torch.as_tensor(np.flatnonzero(own.node == number), device=writes.device)
            yield x, (slopes[..., inside] @ reads[:, inside].T).to(x).view_as(x)
    for matrix in run.maps:
        x = graph.inputs[matrix.name]
        g = real.gradients[matrix.name] @ matrix.flat_weight.T
        yield x, g.to(x).view_as(x)
    with torch.enable_grad():
        total = run.metric(precise(graph.logits), batch).sum()
    yield total, None


def _effects(
    run: _Run,
    embed: Float[Tensor, "batch pos d_model"],
    moves: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> Float[Tensor, "batch pos writer"]:
    """``(c̄_w − c_w) · (w_w · gradient)`` of every node, the embedding last."""
    shape = (*embed.shape[:2], run.sums.total.shape[1])
    effects = embed.new_zeros(shape, dtype=torch.float64)
    for own in run.members:
        if own.map in gradients:
            writes = own.ends.writes
            each = moves[own.map] * (gradients[own.map].to(writes) @ writes.T)
            number = torch.as_tensor(own.node, device=embed.device)
            effects.index_add_(2, number, each.to(effects))
    if EMBED in gradients:
        effects[..., -1] = (embed * gradients[EMBED]).sum(-1).double()
    return effects


def _summed(effects: Float[Tensor, "batch pos writer"]) -> Float[np.ndarray, " writer"]:
    return effects.sum((0, 1)).cpu().numpy()


def _inflow(
    run: _Run, whole: dict[str, Tensor], gradients: dict[str, Tensor]
) -> Float[np.ndarray, " map"]:
    """Effect of every whole map through one node; zero where no path leads."""
    embed = whole[EMBED]
    effects = embed.new_zeros(len(run.maps), dtype=torch.float64)
    for column, matrix in enumerate(run.maps):
        if matrix.name in gradients:
            effects[column] = (whole[matrix.name] * gradients[matrix.name]).sum(dtype=torch.float64)
    return effects.cpu().numpy()


def _record(sums: EdgeSums, batch: Batch, place: int, effects: Tensor) -> None:
    example = effects.sum(1)
    sums.total[place] += example.sum(0).cpu().numpy()
    sums.square[place] += example.square().sum(0).cpu().numpy()
    rows = sums.positions.of_batch(batch).cpu().numpy()
    sums.by_position[place][:, rows] += effects.sum(0).T.cpu().numpy()


def _direct_gradients(
    run: _Run, batch: Batch, graph: CutGraph, target: AnswerTarget
) -> dict[str, Tensor]:
    """Gradient of a target of the first answer token by every map's output, by direct paths.

    Paths lead from a map through its own block's ``W_O`` or ``W_out``, where it does not write the
    residual stream itself, and from there to the logits past all later maps.
    """
    with torch.enable_grad():
        first = graph.logits[:, 0]
        right = first.gather(-1, batch.answer[:, :1].to(first.device))[:, 0]
        total = target(first, right).sum()
    writing = [m for m in run.maps if m.kind in _INSIDE]
    found = graph.pull(total, None, [EMBED, *(m.name for m in writing)])
    there = {own.map for own in run.members}
    for matrix in writing:
        inner = [f"blocks.{matrix.layer}.{kind}" for kind in _INSIDE[matrix.kind]]
        wanted = [name for name in inner if name in there]
        if wanted and matrix.name in found:
            x = graph.inputs[matrix.name]
            gradient = (found[matrix.name] @ matrix.flat_weight.T).view_as(x)
            found |= graph.pull(x, gradient, wanted)
    return found
