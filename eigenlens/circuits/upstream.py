"""Which components feed chosen ones most, by the effect along the edges between them.

Every scored component is a possible writer. Cost per batch: two forward passes and one backward
pass, and for every reader one short backward pass and a projection on all earlier components.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.cut_graph import CutGraph, Norm, RunGradients, cut_graph, run_gradients
from eigenlens.circuits.nodes import Nodes, directions, means_at
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import WeightMatrices
from eigenlens.metrics import Metric
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import COMPONENT, Spectra, Spectrum
from eigenlens.tasks.batches import Batch


def feeding(
    model: TransformerBridge,
    spectra: Spectra,
    maps: WeightMatrices,
    readers: Nodes,
    scores: Scores,
    batches: Sequence[Batch],
    each: int,
    *,
    metric: Metric,
    norm: Norm,
    progress: bool,
) -> pd.DataFrame:
    """The ``each`` strongest scored writers of every reader, without repetition.

    Returns:
        Columns ``layer, matrix, head, index``; readers may be among them.
    """
    known = _by_map(scores)
    totals: dict[tuple[int, str], Float[Tensor, "head rank"]] = {}
    for batch in tqdm(batches, desc="upstream", unit="batch", disable=not progress):
        real = run_gradients(model, maps, batch, metric)
        graph = cut_graph(model, maps, batch, norm)
        moves = {name: _move(spectra[name], own, batch, real) for name, own in known.items()}
        for number in range(len(readers)):
            for name, gradient in _through(spectra, readers, number, real, graph, known).items():
                total = (moves[name] * spectra[name].writes(gradient.to(moves[name]))).sum((0, 1))
                key = (number, name)
                totals[key] = totals[key] + total if key in totals else total
    parts = [
        known[name]
        .components[COMPONENT]
        .assign(reader=number, size=total.abs().flatten().double().cpu().numpy())
        for (number, name), total in totals.items()
    ]
    if not parts:
        return scores.components[COMPONENT].head(0)
    table = pd.concat(parts, ignore_index=True)
    ranked = table[table["size"] > 0].sort_values("size", ascending=False, kind="stable")
    return ranked.groupby("reader").head(each)[COMPONENT].drop_duplicates(ignore_index=True)


def _by_map(scores: Scores) -> dict[str, FrozenSet]:
    """Mean activations of all scored components, map by map."""
    names = "blocks." + scores.components["layer"].astype(str) + "." + scores.components["matrix"]
    return {
        name: FrozenSet.from_scores(scores, np.flatnonzero(names == name))
        for name in dict.fromkeys(names)
    }


def _through(
    spectra: Spectra,
    readers: Nodes,
    number: int,
    real: RunGradients,
    graph: CutGraph,
    writers: Iterable[str],
) -> dict[str, Tensor]:
    """Gradient by the output of every map, through one reader."""
    members = readers.members[readers.members["number"] == number]
    own, name = directions(spectra, members), members["map"].iloc[0]
    x = graph.inputs[name]
    g = real.gradients[name].to(own.writes) @ own.writes.T
    return graph.pull(x, (g @ own.reads.T).to(x).view_as(x), writers)


def _move(
    spectrum: Spectrum, known: FrozenSet, batch: Batch, real: RunGradients
) -> Float[Tensor, "batch pos head rank"]:
    """``ā − a`` of all components of a map; zero at padding."""
    a = spectrum.reads(real.inputs[spectrum.matrix.name].to(spectrum.u))
    means = rearrange(
        means_at(known, batch.positions), "pos (head rank) -> pos head rank", head=a.shape[2]
    )
    return torch.where(batch.attention_mask[..., None, None], means.to(a) - a, 0)
