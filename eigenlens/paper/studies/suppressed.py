"""Is the path of the reading that freezing suppresses real?

arith-tiny's ``a ? b =`` is read as a product; frozen are the components with the lowest scores. The
circuit of these is traced on the same prompts twice, with the products and with the sums as right
answers, and its strongest pruned paths are cut one at a time.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import scipy.stats
from datasets import Dataset
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.circuits import Circuit, circuit, cut_paths
from eigenlens.circuits.nodes import EMBED
from eigenlens.decomposition import decompose
from eigenlens.models import load_model
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.plots.style import BLUE, FULL_WIDTH, GREY, TEMPLATE, VERMILION
from eigenlens.scoring import Scores, score
from eigenlens.selection import select
from eigenlens.tasks import load_task

QUESTION = "Is the path of the suppressed reading real: do cuts change the loss as the graph says?"
MINUTES = 2
COUNT = 15  # components frozen
EDGES, NODES = 60, 15
STRENGTHS = (1.0, 0.01)
_BATCH = 240  # short prompts
_COLOURS = {"product": BLUE, "sum": VERMILION}


def run(models: tuple[str, ...] | None = None, parts: Path | None = None) -> ExperimentResult:
    """Trace, cut and measure.

    Args:
        models: in place of arith-tiny; each must know the task ``ambiguous``.
        parts: not used, the study is short.
    """
    names = models or ("arith-tiny",)
    table = pd.concat([_cuts(name) for name in names], ignore_index=True)
    return ExperimentResult(
        name="suppressed",
        table=table,
        summary=summary(table),
        figure=figure(table),
        settings={"models": ", ".join(names), "components": COUNT, "seed": 0},
        text=text(table),
    )


def _cuts(name: str) -> pd.DataFrame:
    model = load_model(name)
    tasks = {r: load_task("ambiguous", model.tokenizer, reading=r) for r in _COLOURS}
    product, rival = (task.train for task in tasks.values())
    options: dict[str, Any] = {"batch_size": _BATCH, "progress": False}
    spectra = decompose(model, progress=False)
    scores = score(model, spectra, product, criterion="margin", **options)
    frozen = select(scores, count=COUNT)
    found = circuit(model, scores, product, frozen, **options)
    other = circuit(model, scores, rival, frozen, components=found.nodes, **options)
    own = found.edges[found.edges["pruned"] & (found.edges["writer"] != EMBED)]
    order = own["effect"].abs().sort_values(ascending=False).index[:EDGES]
    paths = own.loc[order, ["writer", "reader"]]
    parts = []
    for reading, data, graph in (("product", product, found), ("sum", rival, other)):
        cut = _cut(model, scores, data, graph, paths)
        parts.append(cut.assign(model=name, reading=reading))
    return pd.concat(parts, ignore_index=True)


def _cut(
    model: TransformerBridge, scores: Scores, data: Dataset, graph: Circuit, paths: pd.DataFrame
) -> pd.DataFrame:
    """The paths, and the frozen nodes, cut at every strength."""
    edges = paths.merge(graph.edges, on=["writer", "reader"])
    return pd.concat(
        [
            cut_paths(
                model,
                scores,
                data,
                graph,
                edges=edges,
                nodes=NODES,
                strength=strength,
                batch_size=_BATCH,
            )
            for strength in STRENGTHS
        ],
        ignore_index=True,
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Agreement of prediction and measurement, by what was cut and how far."""
    rows = []
    for (model, reading, cut, strength), part in table.groupby(
        ["model", "reading", "cut", "strength"], sort=False
    ):
        predicted, measured = part["predicted"].to_numpy(), part["measured"].to_numpy()
        rows.append(
            {
                "model": model,
                "right answer": reading,
                "cut": f"{len(part)} {cut}s",
                "strength": strength,
                "same sign": f"{(np.sign(predicted) == np.sign(measured)).mean():.0%}",
                "Pearson": round(float(scipy.stats.pearsonr(predicted, measured).statistic), 3),
                "Spearman": round(float(scipy.stats.spearmanr(predicted, measured).statistic), 3),
                "measured / predicted, median": round(float(np.median(measured / predicted)), 2),
            }
        )
    return pd.DataFrame(rows)


def text(table: pd.DataFrame) -> str:
    """What was cut, and how many cuts swap the two readings."""
    paths = table[(table["cut"] == "edge") & (table["strength"] == 1)]
    wide = paths.pivot_table(
        index=["model", "writer", "reader"], columns="reading", values="measured"
    )
    product = table[(table["reading"] == "product") & (table["predicted"] < 0)]
    harmful = wide.loc[
        wide.index.isin(pd.MultiIndex.from_frame(product[["model", "writer", "reader"]]))
    ]
    swapped = (harmful["product"] < 0) & (harmful["sum"] > 0)
    return (
        f"`a ? b =` read as a product; the {COUNT} components with the lowest `margin` scores are "
        f"frozen. Of the {len(wide)} strongest paths into and out of them, the graph calls "
        f"{len(harmful)} harmful. Cutting each of these alone really lowered the product's loss "
        f"and raised the sum's for {swapped.sum()}: they carry the suppressed reading. Effects are "
        "in nats on the training prompts; below zero, the cut lowers the loss. A whole cut may "
        "differ from its derivative; at a hundredth of the strength both should agree."
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """Measured against predicted effects of whole cuts, paths and nodes apart."""
    whole = table[table["strength"] == 1]
    drawn = make_subplots(
        rows=1, cols=2, horizontal_spacing=0.12, subplot_titles=["paths", "whole components"]
    )
    for column, kind in enumerate(("edge", "node"), start=1):
        own = whole[whole["cut"] == kind]
        both = own[["predicted", "measured"]]
        low, high = float(both.min().min()), float(both.max().max())
        drawn.add_scatter(
            x=[low, high],
            y=[low, high],
            mode="lines",
            line={"color": GREY, "dash": "dot"},
            name="equal",
            showlegend=column == 1,
            row=1,
            col=column,
        )
        for reading, colour in _COLOURS.items():
            part = own[own["reading"] == reading]
            drawn.add_scatter(
                x=part["predicted"],
                y=part["measured"],
                mode="markers",
                marker={"color": colour, "size": 7, "opacity": 0.75},
                name=f"right answer: {reading}",
                showlegend=column == 1,
                customdata=part[["writer", "reader"]],
                hovertemplate=(
                    "%{customdata[0]} → %{customdata[1]}<br>predicted %{x:.3g}, "
                    "measured %{y:.3g} nats<extra></extra>"
                ),
                row=1,
                col=column,
            )
    drawn.update_xaxes(title_text="predicted change of the loss (nats)")
    drawn.update_yaxes(title_text="measured change (nats)")
    drawn.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=430,
        legend={"orientation": "h", "y": -0.24, "x": 0.5, "xanchor": "center"},
        margin={"t": 40, "b": 110},
    )
    return drawn
