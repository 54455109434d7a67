"""How much to freeze: accuracy over the share of components frozen in one shot."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import INTERVALS, own, percent, pooled
from eigenlens.plots.style import BLUE, FULL_WIDTH, GREEN, GREY, ORANGE, TEMPLATE, VERMILION, plain

QUESTION = "How much of a model may be frozen in one shot, by which ranking?"
MINUTES = 15
_BLACK = "#222222"
_COLOURS = {"max": BLUE, "margin": VERMILION, "mean": ORANGE, "random": GREY, "smallest σ": GREEN}
_DASHES = {"random": "dot", "smallest σ": "dash"}


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the columns are."""
    return (
        f"{INTERVALS} Here nothing is chosen: every share is measured on test. A ranking freezes "
        "its lowest scores over the whole model. `random` is matched to `margin` by the number of "
        "components in each matrix."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A line per ranking, a column per share."""
    found = _split(pooled(own(table)))
    found["cell"] = found.apply(percent, axis=1)
    wide = found.pivot(index=["label", "ranking"], columns="p", values="cell")
    wide.columns = ["before" if p == 0 else f"p = {p:g}" for p in wide.columns]
    order = dict.fromkeys(zip(found["label"], found["ranking"], strict=True))
    return wide.loc[list(order)].reset_index().rename(columns={"label": "task"}).fillna("")


def _split(found: pd.DataFrame) -> pd.DataFrame:
    """Methods are named ``ranking, p = share``; ``before`` is share 0 of none."""
    parts = found["method"].str.split(", p = ", n=1, expand=True)
    return found.assign(ranking=parts[0], p=parts[1].astype(float).fillna(0.0))


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per ranking."""
    found = _split(pooled(own(table)))
    labels = list(dict.fromkeys(found["label"]))
    drawn = make_subplots(
        rows=1,
        cols=len(labels),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[plain(label) for label in labels],
    )
    for column, label in enumerate(labels, start=1):
        part = found[found["label"] == label]
        for ranking, line in part[part["ranking"] != "before"].groupby("ranking", sort=False):
            drawn.add_trace(_line(line, str(ranking), column == 1), row=1, col=column)
        base = part[part["ranking"] == "before"]["accuracy"].iloc[0]
        drawn.add_trace(
            go.Scatter(
                x=[part.loc[part["p"] > 0, "p"].min(), part["p"].max()],
                y=[base, base],
                mode="lines",
                line={"color": _BLACK, "width": 1, "dash": "dot"},
                name="before",
                legendgroup="before",
                showlegend=column == 1,
            ),
            row=1,
            col=column,
        )
    drawn.update_xaxes(
        type="log",
        title_text="share of components frozen",
        tickvals=[0.01, 0.02, 0.05, 0.1, 0.2, 0.4],
        tickformat=".0%",
    )
    drawn.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    drawn.update_yaxes(title_text="test accuracy", col=1)
    drawn.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=400,
        legend={"orientation": "h", "y": -0.22, "x": 0.5, "xanchor": "center"},
        margin={"t": 50, "b": 110},
    )
    return drawn


def _line(line: pd.DataFrame, ranking: str, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=line["p"],
        y=line["accuracy"],
        error_y={
            "type": "data",
            "array": line["high"] - line["accuracy"],
            "arrayminus": line["accuracy"] - line["low"],
            "thickness": 1,
            "width": 2,
        },
        mode="lines+markers",
        line={"color": _COLOURS[ranking], "dash": _DASHES.get(ranking, "solid")},
        name=ranking,
        legendgroup=ranking,
        showlegend=legend,
    )
