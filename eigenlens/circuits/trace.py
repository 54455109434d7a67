"""Tracing a circuit: choosing its nodes, and filling its tables from the sums over the data."""

from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.cut_graph import Norm
from eigenlens.circuits.edges import ANSWER_TARGETS, EdgeSums, sum_edges
from eigenlens.circuits.graph import Circuit
from eigenlens.circuits.nodes import (
    EMBED,
    LOGITS,
    Nodes,
    make_nodes,
    score_rows,
    short_name,
)
from eigenlens.circuits.readout import token_summary
from eigenlens.circuits.upstream import feeding
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import weight_matrices
from eigenlens.metrics import Metric, answer_loss, check_eval_mode
from eigenlens.provenance import Provenance, data_hash
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import COMPONENT
from eigenlens.tasks.batches import make_batches


def circuit(
    model: TransformerBridge,
    scores: Scores,
    data: Dataset,
    frozen: FrozenSet | None = None,
    *,
    upstream: int = 2,
    depth: int = 1,
    strongest: int = 20,
    components: pd.DataFrame | None = None,
    metric: Metric = answer_loss,
    norm: Norm | str = "frozen",
    limit: int = 500,
    batch_size: int = 50,
    progress: bool = True,
) -> Circuit:
    """Trace the paths between frozen components, the strongest kept ones, and the logits.

    Args:
        model: the model that was scored, in eval mode.
        scores: give mean coordinates, and which components are strong. Directions of scores that
            were read from a file are found again.
        data: examples that effects are means over.
        frozen: components to mark as pruned; all are nodes.
        upstream: also this many of the strongest writers to each frozen component,
        depth: and to each of these, this many steps back in all.
        strongest: also this many of the kept components with the largest ``|delta_loss|``.
        components: instead of both, these (columns ``layer, matrix, head, index``).
        metric: what effects are effects on; the loss by default.
        norm: ``"frozen"`` linearises every norm with the scale it has in this run (and LayerNorm's
            centring); ``"full"`` also differentiates the scale, and then the effects along all
            edges out of a writer sum to its own first-order effect on any model.
        limit: most nodes; each is one short backward pass per batch.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: no or too many components, or some that were not scored; an unknown ``norm``; a
            ``depth`` below 1; a model in training mode or with other weights; ``frozen`` of another
            basis; a data set that is empty or does not fit.
    """
    if norm not in ("frozen", "full"):
        raise ValueError(f"Unknown norm {norm!r}; choose from frozen, full.")
    if depth < 1:
        raise ValueError(f"depth={depth} is below 1; upstream=0 leaves writers out.")
    check_eval_mode(model)
    basis = _basis(scores.basis, scores.basis_seed)
    if frozen is not None and _basis(frozen.basis, frozen.seed) != basis:
        raise ValueError(
            f"The frozen components are of the basis {_basis(frozen.basis, frozen.seed)}, the "
            f"scores of {basis}: score in the same basis."
        )
    linear: Norm = "full" if norm == "full" else "frozen"
    chosen = _chosen(scores, frozen, strongest, components)
    _check_number(len(chosen), limit)
    spectra, maps = scores.spectra_on(model), weight_matrices(model)
    batches = make_batches(data, model, batch_size)
    readers = None if components is not None or frozen is None else frozen.components
    for _ in range(depth if upstream else 0):
        if readers is None or not len(readers):
            break
        _check_number(len(chosen) + upstream * len(readers), limit)
        options: dict[str, Any] = {"metric": metric, "norm": linear, "progress": progress}
        placed = make_nodes(spectra, readers)
        readers = feeding(model, maps, placed, scores, batches, upstream, **options)
        chosen = pd.concat([chosen, readers], ignore_index=True)
    nodes = make_nodes(spectra, chosen)
    rows = score_rows(scores, nodes.members)
    sums = sum_edges(
        model,
        maps,
        nodes,
        scores.means[rows],
        batches,
        metric=metric,
        norm=linear,
        reference=scores.reference,
        progress=progress,
    )
    outflows, inflows = _outflows(nodes, sums), _inflows(nodes, sums)
    table = _node_table(nodes, sums, scores.delta_loss[rows], frozen).assign(
        outflow=_summed(outflows, "writer", nodes), inflow=_summed(inflows, "reader", nodes)
    )
    return Circuit(
        nodes=table.join(token_summary(model, nodes)),
        edges=_edge_table(table, sums),
        outflows=outflows,
        inflows=inflows,
        norm=norm,
        n_examples=len(data),
        provenance=Provenance.of(model, task_hash=data_hash(data)),
    )


def _basis(name: str, seed: int | None) -> str:
    return f"{name} (seed {seed})" if name == "random" else name


def _chosen(
    scores: Scores,
    frozen: FrozenSet | None,
    strongest: int,
    components: pd.DataFrame | None,
) -> pd.DataFrame:
    parts = [] if frozen is None else [frozen.components[COMPONENT]]
    if components is None:
        taken = pd.MultiIndex.from_frame(parts[0]) if parts else None
        all_of_them = scores.components[COMPONENT]
        kept = np.ones(len(scores), bool)
        if taken is not None:
            kept = ~pd.MultiIndex.from_frame(all_of_them).isin(taken)
        order = np.argsort(-np.abs(scores.delta_loss), kind="stable")
        parts.append(all_of_them.iloc[order[kept[order]][:strongest]])
    else:
        parts.append(components)
    return pd.concat(parts, ignore_index=True)


def _check_number(count: int, limit: int) -> None:
    if count == 0:
        raise ValueError("No components: give frozen=, components= or strongest= above 0.")
    if count > limit:
        raise ValueError(
            f"{count} components are more than limit={limit}. Each is one backward pass per batch: "
            "choose fewer through components=, upstream= or strongest=, or raise limit=."
        )


def _outflows(nodes: Nodes, sums: EdgeSums) -> pd.DataFrame:
    maps = [short_name(name) for name in sums.targets[len(nodes) :]]
    effects = sums.total[len(nodes) :] / sums.n_examples
    return _flows(effects.T, "writer", [*nodes.table["node"], EMBED], maps)


def _inflows(nodes: Nodes, sums: EdgeSums) -> pd.DataFrame:
    maps = [*map(short_name, sums.targets[len(nodes) : -1]), EMBED]
    embed = sums.total[: len(nodes), -1:]
    effects = np.concatenate([sums.inflow, embed], axis=1) / sums.n_examples
    return _flows(effects, "reader", nodes.table["node"].tolist(), maps)


def _flows(effects: np.ndarray, end: str, nodes: list[str], maps: list[str]) -> pd.DataFrame:
    """One row for each effect between a node and a map that is not zero."""
    node, at = np.nonzero(effects)
    names = {end: np.array(nodes, object)[node], "map": np.array(maps, object)[at]}
    return pd.DataFrame({**names, "effect": effects[node, at]})


def _summed(flows: pd.DataFrame, end: str, nodes: Nodes) -> np.ndarray:
    total = flows.groupby(end)["effect"].sum()
    return total.reindex(nodes.table["node"]).fillna(0.0).to_numpy()


def _node_table(
    nodes: Nodes,
    sums: EdgeSums,
    delta_loss: np.ndarray,
    frozen: FrozenSet | None,
) -> pd.DataFrame:
    members = nodes.members.assign(delta_loss=delta_loss, strength=0.0)
    if frozen is not None and len(frozen):
        strength = frozen.components.set_index(COMPONENT)["strength"]
        keys = pd.MultiIndex.from_frame(members[COMPONENT])
        members["strength"] = strength.reindex(keys).fillna(0.0).to_numpy()
    grouped = members.groupby("number")
    direct = zip(ANSWER_TARGETS, sums.direct[:, :-1] / sums.n_examples, strict=True)
    return nodes.table.assign(
        strength=grouped["strength"].mean().to_numpy(),
        delta_loss=grouped["delta_loss"].sum().to_numpy(),
        effect=sums.own[:-1] / sums.n_examples,
        **dict(direct),
    )


def _edge_table(nodes: pd.DataFrame, sums: EdgeSums) -> pd.DataFrame:
    """One row for each pair of a writer and a reader whose effect is not zero."""
    n = sums.n_examples
    names = np.array([*nodes["node"], EMBED], object)
    pruned = np.array([*(nodes["strength"] > 0), False])
    readers = [*range(len(nodes)), len(sums.targets) - 1]
    total, square = sums.total[readers], sums.square[readers]
    reader, writer = np.nonzero(total)
    spread = np.maximum(0, square - total**2 / n) / max(1, n - 1)
    peak = np.abs(sums.by_position[readers]).argmax(-1)
    return pd.DataFrame(
        {
            "writer": names[writer],
            "reader": np.array([*nodes["node"], LOGITS], object)[reader],
            "effect": total[reader, writer] / n,
            "stderr": np.sqrt(spread / n)[reader, writer],
            "position": sums.positions.start + peak[reader, writer],
            "pruned": pruned[writer] | pruned[reader],  # the last reader, the logits, is not
        }
    )
