"""Cutting paths for real: does the metric change as the graph says?

An edge is cut with strength z by letting its reader alone see the writer's coordinate moved by
``z (c̄_w − c_w)``: one pass with every map's output held at its value gives what the reader would
see, a second pass runs the model with only the reader's output changed accordingly. Norms are as
the circuit took them: held at the scale of the run, or real. A node is cut by freezing it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.cut_graph import Hooks, editing_norms, scale_hooks
from eigenlens.circuits.edges import moved
from eigenlens.circuits.graph import Circuit
from eigenlens.circuits.nodes import EMBED, LOGITS, Node, make_nodes, score_rows
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import WeightMatrices, weight_matrices
from eigenlens.metrics import Metric, answer_logits, answer_loss, check_eval_mode, precise
from eigenlens.scoring.scores import Scores
from eigenlens.tasks.batches import Batch, make_batches

_COLUMNS = ["cut", "writer", "reader", "strength", "predicted", "measured"]


def cut_paths(
    model: TransformerBridge,
    scores: Scores,
    data: Dataset,
    circuit: Circuit,
    *,
    edges: int | pd.DataFrame = 10,
    nodes: int = 10,
    strength: float = 1.0,
    metric: Metric = answer_loss,
    batch_size: int = 50,
) -> pd.DataFrame:
    """Cut edges and nodes of a circuit and measure the metric.

    Args:
        model: as it was when the circuit was traced.
        scores: the scores that the circuit was traced with. Directions of scores that were read
            from a file are found again.
        data: the examples that it was traced on.
        circuit: what predicts.
        edges: how many of the strongest edges to cut, or rows of ``circuit.edges``. Edges out of
            the embedding are not cut.
        nodes: how many of the nodes with the largest ``|effect|`` to freeze.
        strength: z in (0, 1]: 1 cuts, less attenuates.
        metric: the circuit's.
        batch_size: examples per pass.

    Returns:
        One row per cut: ``cut`` (``edge`` or ``node``), ``writer``, ``reader``, ``strength``, and
        the ``predicted`` (strength × effect) and ``measured`` mean change of the metric.

    Raises:
        ValueError: a strength outside (0, 1]; a model in training mode or with other weights.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength={strength} lies outside (0, 1].")
    check_eval_mode(model)
    scores = scores.on(model)
    found = make_nodes(scores.spectra_on(model), circuit.nodes)
    own = circuit.edges[circuit.edges["writer"] != EMBED]
    if isinstance(edges, int):
        order = np.argsort(-own["effect"].abs().to_numpy(), kind="stable")[:edges]
        chosen = own.iloc[order]
    else:
        chosen = edges[edges["writer"] != EMBED]
    known = {node.name: node for node in found}
    members = {name: score_rows(scores, found.members_of(name)) for name in known}
    maps = weight_matrices(model)
    run = _Cutter(model, maps, scores, known, members, metric, circuit.norm, strength)
    batches = make_batches(data, model, batch_size)
    changes = sum(run.edges(batch, chosen) for batch in batches) if len(chosen) else np.zeros(0)
    cut = chosen.assign(cut="edge", measured=np.atleast_1d(changes))
    frozen = circuit.nodes.sort_values("effect", key=np.abs, ascending=False).head(nodes)
    frozen = frozen.rename(columns={"node": "writer"}).assign(cut="node", reader="all")
    before = run.total(batches) if len(frozen) else 0.0
    frozen["measured"] = [run.without(batches, node) - before for node in frozen["writer"]]
    table = pd.concat([cut, frozen], ignore_index=True).assign(strength=strength)
    table["predicted"] = strength * table["effect"]
    table["measured"] = table["measured"].astype(float) / len(data)
    return table[_COLUMNS]


@dataclass
class _Cutter:
    """Cuts nodes, by name, and edges between them; ``rows`` of the scores are their members."""

    model: TransformerBridge
    maps: WeightMatrices
    scores: Scores
    nodes: dict[str, Node]
    rows: dict[str, np.ndarray]
    metric: Metric
    norm: str
    strength: float

    def total(self, batches: list[Batch]) -> float:
        """Summed metric."""
        return sum(self._metric(batch, []) for batch in batches)

    def without(self, batches: list[Batch], node: str) -> float:
        """Summed metric when the node is frozen for all."""
        frozen = FrozenSet.from_scores(self.scores, self.rows[node], self.strength)
        with freeze(self.model, frozen):
            return self.total(batches)

    def edges(self, batch: Batch, edges: pd.DataFrame) -> np.ndarray:
        """Summed change of the metric for each edge when it alone is cut."""
        clean = _Clean.of(self.model, self.maps, batch)
        before = self._metric(batch, [])
        changes = np.zeros(len(edges))
        for writer, group in edges.assign(place=range(len(edges))).groupby("writer"):
            seen = self._seen(batch, clean, str(writer))
            for reader, place in zip(group["reader"], group["place"], strict=True):
                if reader == LOGITS:
                    after = self._value(seen.logits, batch)
                else:
                    after = self._metric(batch, self._reread(clean, seen, reader))
                changes[place] = after - before
        return changes

    def _seen(self, batch: Batch, clean: "_Clean", writer: str) -> "_Clean":
        """All inputs when one node is moved and every other map's output is held."""
        node = self.nodes[writer]
        ends, name = node.ends(self.model), node.site.map_name
        means = self.scores.means[self.rows[writer]]
        move = moved(means, ends.coordinates(clean.inputs[name].flatten(2)), batch)
        shift = self.strength * move @ ends.writes
        held = dict(clean.outputs)
        held[name] = held[name] + shift.to(held[name]).view_as(held[name])
        scales = clean.scales if self.norm == "frozen" else {}
        return _Clean.of(self.model, self.maps, batch, held, scales)

    def _reread(self, clean: "_Clean", seen: "_Clean", reader: str) -> Hooks:
        """Hook that gives the reader's output what it reads of the moved input."""
        node = self.nodes[reader]
        ends, name = node.ends(self.model), node.site.map_name
        change = (seen.inputs[name] - clean.inputs[name]).flatten(2).to(ends.reads)
        change = change @ ends.reads @ ends.writes
        hook = node.site.find(self.model).hook_out
        return [(hook, lambda value, hook: value + change.to(value).view_as(value))]

    def _metric(self, batch: Batch, hooks: Hooks) -> float:
        with torch.no_grad(), self.model.hooks(fwd_hooks=hooks):
            return self._value(answer_logits(self.model, batch), batch)

    def _value(self, logits: Tensor, batch: Batch) -> float:
        return float(self.metric(precise(logits), batch).double().sum())


@dataclass
class _Clean:
    """Inputs and outputs of every map in one pass, scales of norms, and the logits."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    scales: dict[str, Tensor]
    logits: Tensor

    @classmethod
    def of(
        cls,
        model: TransformerBridge,
        maps: WeightMatrices,
        batch: Batch,
        held: dict[str, Tensor] | None = None,
        scales: dict[str, Tensor] | None = None,
    ) -> "_Clean":
        """Run ``batch``, with outputs and scales put in place where given."""
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        seen_scales: dict[str, Tensor] = {}

        def keep(into: dict[str, Tensor], name: str, value: Tensor, hook: Any) -> None:
            into[name] = value

        def put(values: dict[str, Tensor], name: str, value: Tensor, hook: Any) -> Tensor:
            return values[name]

        hooks: Hooks = []
        for m in maps:
            hooks.append((m.hook_in, partial(keep, inputs, m.name)))
            hook = partial(put, held, m.name) if held else partial(keep, outputs, m.name)
            hooks.append((m.hook_out, hook))
        for name in scale_hooks(model):
            hooks.append(
                (name, partial(put, scales, name) if scales else partial(keep, seen_scales, name))
            )
        with torch.no_grad(), editing_norms(), model.hooks(fwd_hooks=hooks):
            logits = answer_logits(model, batch)
        return cls(inputs, outputs, seen_scales, logits)
