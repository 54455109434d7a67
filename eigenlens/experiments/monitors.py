"""The paper's failure signatures: do outputs stop depending on the input, do other tasks suffer?"""

import sys
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from eigenlens.experiments.grid import grid_result
from eigenlens.experiments.result import ExperimentResult
from eigenlens.plots.style import (
    BLUE,
    FULL_WIDTH,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    TEMPLATE,
    VERMILION,
)

QUESTION = "Does an edit break the model: same answer to everything, other tasks lost?"
MINUTES = 20
_COLOURS = (GREY, BLUE, VERMILION, ORANGE, GREEN, PINK, SKY)
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star")


def run(
    models: tuple[str, ...] | None = None,
    config: Path | None = None,
    parts: Path | None = None,
) -> ExperimentResult:
    """Run ``configs/monitors.yaml``, or ``config``."""
    return grid_result(sys.modules[__name__], "monitors", models, config, parts)


def text(table: pd.DataFrame) -> str:
    """What the columns are."""
    return (
        "Each edit was made for the task in the second column, and the model measured under it on "
        "the data in the fourth. Entropy: of the first answer token, mean over examples. "
        "Information: mutual information of prompt and first answer token, "
        "H(mean p) − mean H(p): zero where the output no longer depends on the input. Variance: "
        "of the token's probabilities over examples, summed over the vocabulary. Same token: "
        "share of examples whose most likely first token is the most frequent one. Means over "
        "seeds."
    )


def _means(table: pd.DataFrame) -> pd.DataFrame:
    probed = table[table["data"] != ""]
    columns = ["entropy", "information", "variance", "most_common", "perplexity"]
    by = ["model", "label", "method", "data"]
    sums = probed.groupby(by, sort=False)[["right", "n"]].sum()
    means = probed.groupby(by, sort=False)[columns].mean()
    return means.join((sums["right"] / sums["n"]).rename("accuracy")).reset_index()


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per edit and data set."""
    found = _means(table)
    return pd.DataFrame(
        {
            "model": found["model"],
            "made for": found["label"],
            "edit": found["method"],
            "measured on": found["data"],
            "exact": found["accuracy"].map("{:.1%}".format),
            "entropy (nats)": found["entropy"].map("{:.2f}".format),
            "information (nats)": found["information"].map("{:.2f}".format),
            "variance": found["variance"].map("{:.3f}".format),
            "same token": found["most_common"].map("{:.0%}".format),
            "perplexity": found["perplexity"].map(lambda v: "" if pd.isna(v) else f"{v:.1f}"),
        }
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """Entropy against information, an arrow's worth of points per data set."""
    found = _means(table)
    data = list(dict.fromkeys(found["data"]))
    methods = list(dict.fromkeys(found["method"]))
    drawn = go.Figure()
    for number, method in enumerate(methods):
        part = found[found["method"] == method].drop_duplicates(
            ["model", "data"] if method == "before" else ["model", "label", "data"]
        )
        drawn.add_trace(
            go.Scatter(
                x=[data.index(name) for name in part["data"]],
                y=part["information"],
                mode="markers",
                marker={
                    "color": _COLOURS[number],
                    "symbol": _SYMBOLS[number],
                    "size": 9,
                    "opacity": 0.85,
                },
                name=method,
                text=part["model"] + ", made for " + part["label"],
            )
        )
    drawn.update_xaxes(
        tickvals=list(range(len(data))), ticktext=data, title_text="measured on", tickangle=-25
    )
    drawn.update_yaxes(title_text="information of the first<br>answer token about the input (nats)")
    drawn.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=430,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"t": 80, "b": 110, "l": 100},
    )
    return drawn
