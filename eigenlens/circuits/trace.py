"""Tracing a circuit: choosing its nodes, and filling its tables from the sums over the data."""

from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.cut_graph import Norm
from eigenlens.circuits.edges import ANSWER_TARGETS, EdgeSums, sum_edges
from eigenlens.circuits.graph import Circuit
from eigenlens.circuits.nodes import EMBED, LOGITS, Nodes, make_nodes, score_rows, short_name
from eigenlens.circuits.readout import token_summary
from eigenlens.circuits.upstream import feeding
from eigenlens.decomposition import decompose
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import weight_matrices
from eigenlens.metrics import Metric, answer_loss, check_eval_mode
from eigenlens.provenance import Provenance, text_hash
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import COMPONENT, Spectra
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
        scores: give mean activations, and which components are strong.
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
            ``depth`` below 1; a model in training mode or with other weights; a data set that is
            empty or does not fit.
    """
    if norm not in ("frozen", "full"):
        raise ValueError(f"Unknown norm {norm!r}; choose from frozen, full.")
    if depth < 1:
        raise ValueError(f"depth={depth} is below 1; upstream=0 leaves writers out.")
    check_eval_mode(model)
    provenance = Provenance.of(model, task_hash=text_hash(data.to_list()))
    if provenance.model_fingerprint != scores.provenance.model_fingerprint:
        raise ValueError("The scores belong to a model with other weights: score this model.")
    linear: Norm = "full" if norm == "full" else "frozen"
    chosen = _chosen(scores, frozen, strongest, components)
    _check_number(len(chosen), limit)
    batches = make_batches(data, model, batch_size)
    spectra, maps = _spectra(model, scores), weight_matrices(model)
    readers = None if components is not None or frozen is None else frozen.components
    for _ in range(depth if upstream else 0):
        if readers is None or not len(readers):
            break
        _check_number(len(chosen) + upstream * len(readers), limit)
        options: dict[str, Any] = {"metric": metric, "norm": linear, "progress": progress}
        placed = make_nodes(spectra, readers)
        readers = feeding(model, spectra, maps, placed, scores, batches, upstream, **options)
        chosen = pd.concat([chosen, readers], ignore_index=True)
    nodes = make_nodes(spectra, chosen)
    rows = score_rows(scores, nodes.members)
    sums = sum_edges(
        model,
        spectra,
        maps,
        nodes,
        FrozenSet.from_scores(scores, rows),
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
        nodes=table.join(token_summary(model, spectra, nodes)),
        edges=_edge_table(table, sums),
        outflows=outflows,
        inflows=inflows,
        norm=norm,
        n_examples=len(data),
        provenance=provenance,
    )


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


def _spectra(model: TransformerBridge, scores: Scores) -> Spectra:
    if scores.spectra is not None:
        return scores.spectra
    kinds, layers = set(scores.components["matrix"]), set(scores.components["layer"].tolist())
    return decompose(model, sorted(kinds), sorted(layers), progress=False)


def _outflows(nodes: Nodes, sums: EdgeSums) -> pd.DataFrame:
    writers = [*nodes.table["node"], EMBED]
    rows = [
        {
            "writer": writer,
            "map": short_name(sums.targets[place]),
            "effect": total / sums.n_examples,
        }
        for place in range(len(nodes), len(sums.targets))
        for writer, total in zip(writers, sums.total[place].tolist(), strict=True)
        if total != 0
    ]
    return pd.DataFrame(rows, columns=["writer", "map", "effect"])


def _inflows(nodes: Nodes, sums: EdgeSums) -> pd.DataFrame:
    maps = [*map(short_name, sums.targets[len(nodes) : -1]), EMBED]
    rows = [
        {"reader": reader, "map": name, "effect": total / sums.n_examples}
        for place, reader in enumerate(nodes.table["node"])
        for name, total in zip(
            maps, [*sums.inflow[place].tolist(), float(sums.total[place, -1])], strict=True
        )
        if total != 0
    ]
    return pd.DataFrame(rows, columns=["reader", "map", "effect"])


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
    n = sums.n_examples
    names = nodes["node"].tolist()
    pruned = {name for name, z in zip(names, nodes["strength"], strict=True) if z > 0}
    readers = [*enumerate(names), (len(sums.targets) - 1, LOGITS)]
    rows = []
    for place, reader in readers:
        for column, writer in enumerate([*names, EMBED]):
            total = float(sums.total[place, column])
            if total == 0:
                continue
            spread = max(0.0, float(sums.square[place, column]) - total**2 / n)
            peak = int(np.abs(sums.by_position[place, column]).argmax())
            rows.append(
                {
                    "writer": writer,
                    "reader": reader,
                    "effect": total / n,
                    "stderr": (spread / max(1, n - 1) / n) ** 0.5,
                    "position": sums.positions[peak],
                    "pruned": writer in pruned or reader in pruned,
                }
            )
    columns = ["writer", "reader", "effect", "stderr", "position", "pruned"]
    return pd.DataFrame(rows, columns=columns)
