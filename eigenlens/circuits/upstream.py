"""Which components feed chosen ones most, by the effect along the edges between them.

Every scored component is a possible writer. Cost per batch: two forward passes and one backward
pass, and for every reader one short backward pass and a projection on all earlier components.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits.cut_graph import CutGraph, Norm, RunGradients, cut_graph, run_gradients
from eigenlens.circuits.edges import moved
from eigenlens.circuits.nodes import Nodes
from eigenlens.far_side import MapDirections
from eigenlens.matrices import WeightMatrices, WeightMatrix
from eigenlens.metrics import Metric
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import COMPONENT, Spectrum, by_matrix
from eigenlens.tasks.batches import Batch


@torch.no_grad()
def feeding(
    model: TransformerBridge,
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
    """The ``each`` strongest scored writers of every reader.

    Returns:
        Columns ``layer, matrix, head, index``; readers may be among them.
    """
    groups = by_matrix(scores.components).items()
    writers = [(readers.spectra[name], rows) for name, rows in groups]
    matrices = {m.name: m for m in maps}
    names = [spectrum.site.map_name for spectrum, _ in writers]
    ends = [(node.site.map_name, node.ends(model)) for node in readers]
    totals = np.zeros((len(readers), len(scores)))
    for batch in tqdm(batches, desc="upstream", unit="batch", disable=not progress):
        real = run_gradients(model, maps, batch, metric)
        graph = cut_graph(model, maps, batch, norm)
        moves = [
            moved(scores.means[rows], _coordinates(spectrum, real), batch)
            for spectrum, rows in writers
        ]
        for number, (reader, own) in enumerate(ends):
            gradients = _through(reader, own, real, graph, names)
            found = {
                place: (move * _slopes(spectrum, matrices[name], gradients[name])).sum((0, 1))
                for place, ((spectrum, _), name, move) in enumerate(
                    zip(writers, names, moves, strict=True)
                )
                if name in gradients
            }
            if found:  # one wait for the device, not one for every map
                rows = np.concatenate([writers[place][1] for place in found])
                parts = [part.double().to(batch.tokens.device) for part in found.values()]
                totals[number, rows] += torch.cat(parts).cpu().numpy()
    sizes = np.abs(totals)
    strongest = np.argsort(-sizes, axis=1, kind="stable")[:, :each]
    there = np.take_along_axis(sizes, strongest, axis=1) > 0
    return scores.components[COMPONENT].iloc[np.unique(strongest[there])]


def _through(
    name: str, own: MapDirections, real: RunGradients, graph: CutGraph, writers: Sequence[str]
) -> dict[str, Tensor]:
    """Gradient by the output of every map, through one reader of the map ``name``."""
    x = graph.inputs[name]
    g = real.gradients[name].to(own.writes) @ own.writes.T
    return graph.pull(x, (g @ own.reads.T).to(x).view_as(x), writers)


def _coordinates(spectrum: Spectrum, real: RunGradients) -> Float[Tensor, "batch pos k"]:
    """Coordinates of all components of a map, head by head."""
    site = spectrum.site
    h = (real.inputs if site.side == "in" else real.outputs)[site.map_name]
    return spectrum.coordinates(site.split(h.to(spectrum.dtype), h.shape[1])).flatten(2)


def _slopes(
    spectrum: Spectrum, matrix: WeightMatrix, gradient: Float[Tensor, "batch pos all_out"]
) -> Float[Tensor, "batch pos k"]:
    """Derivative along every coordinate, from the gradient by the output of the map."""
    g = gradient.to(spectrum.dtype)
    if spectrum.site.side == "in":
        g = g @ matrix.flat_weight.T.to(g)
    return spectrum.slopes(spectrum.site.split(g, g.shape[1])).flatten(2)
