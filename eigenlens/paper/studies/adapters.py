"""How few trained numbers does it take? Small adapters beside eigenpruning."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.harm import harm_by_cell
from eigenlens.paper.studies.views import INTERVALS, own, percent, pooled
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

QUESTION = "How few trained numbers does a task take, and what do they cost elsewhere?"
MINUTES = 30
_COLOURS = (BLUE, SKY, VERMILION, ORANGE, GREEN, PINK, GREY)
_SYMBOLS = ("circle", "square", "diamond")
_LEAST = 1e-3  # nats: what harms less is drawn there


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What was found, and what the columns are."""
    best = [_best(part) for _, part in _found(table).groupby(["model", "label"], sort=False)]
    return (
        f"{' '.join(best)} {INTERVALS} Every adapter has one setting and three learning rates "
        "(0.001, 0.01, 0.1), of which validation chooses one together with the epoch. `Numbers "
        "set` counts what a file of the edit has to hold: trained numbers (what follows from a "
        "seed or from the model's own weights is made again), or strengths and means of frozen "
        "components. Harm is the rise of the loss, in nats per token, on addition for arith-tiny "
        "and on WikiText-2 for models of language, mean over seeds."
    )


def _best(found: pd.DataFrame) -> str:
    """The fewest numbers that reach what the best method reaches, within its interval."""
    edits = found[found["method"] != "before"]
    top = edits.sort_values("accuracy", kind="stable").iloc[-1]
    enough = edits[edits["accuracy"] >= top["low"]]
    least = enough.sort_values("parameters_changed", kind="stable").iloc[0]
    reached = (
        f"{top['label']}: {top['method']} reaches {top['accuracy']:.0%} with "
        f"{top['parameters_changed']:,.0f} numbers"
    )
    if least["method"] == top["method"]:
        return f"{reached}, and none with fewer is within its interval."
    return (
        f"{reached}; {least['method']}, with {least['parameters_changed']:,.0f}, is within its "
        f"interval ({least['accuracy']:.0%})."
    )


def _found(table: pd.DataFrame) -> pd.DataFrame:
    """A row per model, task and method, with its harm."""
    cells = own(table)
    harm = harm_by_cell(table)
    by = ["model", "label", "method"]
    mean = cells.assign(harm=cells["cell"].map(harm)).groupby(by, sort=False)["harm"].mean()
    found = pooled(cells)
    return found.assign(harm=mean.loc[pd.MultiIndex.from_frame(found[by])].to_numpy())


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, size and harm of every method."""
    found = _found(table)
    return pd.DataFrame(
        {
            "model": found["model"],
            "task": found["label"],
            "method": found["method"],
            "test accuracy": found.apply(percent, axis=1),
            "numbers set": found["parameters_changed"].map("{:,.0f}".format),
            "harm (nats per token)": found["harm"].map("{:.3f}".format),
            "tried": found["candidates"].map("{:.0f}".format),
            "seconds": found["seconds"].map("{:.0f}".format),
        }
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A row per task: accuracy over the numbers set, and over the harm."""
    found = _found(table)
    groups = dict(list(found.groupby(["model", "label"], sort=False)))
    drawn = make_subplots(
        rows=len(groups),
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.04,
        vertical_spacing=0.3 / len(groups),
        row_titles=[plain(f"{model}, {label}") for model, label in groups],
    )
    methods = [name for name in dict.fromkeys(found["method"]) if name != "before"]
    for row, part in enumerate(groups.values(), start=1):
        for column, x in enumerate(("parameters_changed", "harm"), start=1):
            for number, method in enumerate(methods):
                mine = part[part["method"] == method]
                drawn.add_trace(_point(mine, x, number), row=row, col=column)
            base = part.loc[part["method"] == "before", "accuracy"]
            for value in base:
                drawn.add_hline(value, line={"color": GREY, "dash": "dot"}, row=row, col=column)
    drawn.update_xaxes(type="log", exponentformat="power", dtick=1)
    drawn.update_xaxes(title_text="numbers set", row=len(groups), col=1)
    drawn.update_xaxes(
        title_text=f"harm (nats per token; {_LEAST:g} or less at the left)", row=len(groups), col=2
    )
    drawn.update_yaxes(range=[-0.03, 1.03], tickformat=".0%")
    drawn.update_yaxes(title_text="test accuracy", col=1)
    one_legend_entry_each(drawn)
    height = 200 + 260 * len(groups)
    drawn.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=height,
        legend={"orientation": "h", "y": -75 / (height - 200), "x": 0.5, "xanchor": "center"},
        margin={"t": 40, "b": 160, "r": 50},
    )
    return drawn


def _point(mine: pd.DataFrame, x: str, number: int) -> go.Scatter:
    return go.Scatter(
        x=mine[x].clip(lower=_LEAST),
        y=mine["accuracy"],
        error_y={
            "type": "data",
            "array": mine["high"] - mine["accuracy"],
            "arrayminus": mine["accuracy"] - mine["low"],
            "thickness": 1,
            "width": 2,
        },
        mode="markers",
        marker={
            "color": _COLOURS[number % len(_COLOURS)],
            "symbol": _SYMBOLS[number // len(_COLOURS)],
            "size": 9,
        },
        name=plain(mine["method"].iloc[0]) if len(mine) else "",
        legendgroup=str(number),
        showlegend=bool(len(mine)),
    )
