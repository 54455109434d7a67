"""The paper's failure signatures: do outputs stop depending on the input, do other tasks suffer?"""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.paper.studies.grid import grid_study
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
    one_legend_entry_each,
    plain,
)

QUESTION = "Does an edit break the model: same answer to everything, other tasks lost?"
MINUTES = 20
_COLOURS = (BLUE, VERMILION, ORANGE, GREEN, PINK, SKY, GREY, "#222222")
_SYMBOLS = ("circle", "square", "diamond", "cross", "x", "triangle-up", "star", "hexagram")


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the columns are."""
    return (
        "Each edit was made for the task in the second column, and the model measured under it on "
        "the data in the fourth. Entropy: of the first answer token, mean over examples. "
        "Information: mutual information of prompt and first answer token, "
        "H(mean p) − mean H(p): zero where the output no longer depends on the input. Variance: "
        "of the token's probabilities over examples, summed over the vocabulary. Same token: "
        "share of examples whose most likely first token is the most frequent one. Means over "
        "seeds. Where a tokenizer begins every number with the same token, as SmolLM2's does, the "
        "first token of a sum says nothing, and text is the better witness."
    )


def _means(table: pd.DataFrame) -> pd.DataFrame:
    probed = table[table["data"] != ""]
    columns = ["entropy", "information", "variance", "most_common", "perplexity"]
    by = ["model", "label", "method", "data"]
    sums = probed.groupby(by, sort=False)[["right", "n"]].sum()
    means = probed.groupby(by, sort=False)[columns].mean()
    # Of single answers a perplexity says little.
    texts = probed.groupby(by, sort=False)["task"].first() == "wikitext"
    means["perplexity"] = means["perplexity"].where(texts)
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
    """Information that outputs carry about inputs, for each edit and data set."""
    found = _means(table)
    found["panel"] = found["model"].map(plain) + "<br>made for " + found["label"].map(plain)
    panels, data, methods = (list(dict.fromkeys(found[c])) for c in ("panel", "data", "method"))
    drawn = make_subplots(
        rows=1,
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=panels,
    )
    for column, panel in enumerate(panels, start=1):
        for number, name in enumerate(data):
            part = found[(found["panel"] == panel) & (found["data"] == name)]
            if len(part):
                drawn.add_trace(_points(part, name, number, methods), row=1, col=column)
    one_legend_entry_each(drawn)
    drawn.update_xaxes(title_text="information (nats)", rangemode="tozero")
    drawn.update_yaxes(
        tickvals=list(range(len(methods))),
        ticktext=[plain(method) for method in methods],
        range=[len(methods) - 0.4, -0.6],
        automargin=True,
        zeroline=False,
    )
    drawn.update_yaxes(title_text="edit", col=1)
    drawn.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=460,
        legend={"orientation": "h", "y": -0.3, "x": 0.5, "xanchor": "center", "title": "on"},
        margin={"t": 70, "b": 130},
    )
    return drawn


def _points(part: pd.DataFrame, name: str, number: int, methods: list[str]) -> go.Scatter:
    return go.Scatter(
        x=part["information"],
        y=[methods.index(method) for method in part["method"]],
        mode="markers",
        marker={
            "color": _COLOURS[number % len(_COLOURS)],
            "symbol": _SYMBOLS[number % len(_SYMBOLS)],
            "size": 9,
            "opacity": 0.85,
        },
        name=plain(name),
        legendgroup=name,
    )
