"""Methods side by side: what each reaches on a task, and what it costs."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.plots.style import BLUE, FULL_WIDTH, GREEN, ORANGE, TEMPLATE, log_ticks, plain

_COLUMNS = ("method", "accuracy", "low", "high", "seconds", "parameters")
_COSTS = (("seconds", "time (s)", ORANGE), ("parameters", "numbers learned or chosen", GREEN))
_TOP, _BOTTOM, _ROW = 20, 70, 30  # pixels


def methods(table: pd.DataFrame) -> go.Figure:
    """A row per method: accuracy with its interval, time, and how many numbers the method sets.

    Costs are on logarithmic axes; a cost of zero is written at the edge, a missing one left out.

    Args:
        table: one row per method, drawn from top to bottom, with the columns ``method``,
            ``accuracy`` and its interval's ends ``low`` and ``high`` (shares), ``seconds`` and
            ``parameters``.

    Raises:
        ValueError: a missing column, no rows, or a method that comes twice.
    """
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise ValueError(f"The table of methods lacks the columns {', '.join(missing)}.")
    if table.empty:
        raise ValueError("The table of methods has no rows.")
    twice = table["method"][table["method"].duplicated()]
    if len(twice):
        raise ValueError(f"{twice.iloc[0]!r} comes twice: add up its rows first.")
    table = table.assign(method=table["method"].map(plain))
    figure = make_subplots(
        rows=1, cols=3, shared_yaxes=True, horizontal_spacing=0.03, column_widths=[0.46, 0.27, 0.27]
    )
    figure.add_trace(_accuracy(table), row=1, col=1)
    figure.update_xaxes(
        title_text="accuracy, 95 % interval", tickformat=".0%", range=[-0.02, 1.02], col=1
    )
    for column, (name, title, colour) in enumerate(_COSTS, start=2):
        costs = table[name].astype(float)
        low, high = _bounds(costs)
        marks, texts = log_ticks(low, high, most=4)
        figure.add_trace(_cost(table["method"], costs, name, colour), row=1, col=column)
        figure.add_trace(_zeros(table["method"][costs == 0], low, name), row=1, col=column)
        figure.update_xaxes(
            title_text=title,
            type="log",
            range=[np.log10(low / 1.6), np.log10(high)],
            tickvals=marks,
            ticktext=texts,
            col=column,
        )
    order = list(table["method"])[::-1]
    figure.update_yaxes(categoryorder="array", categoryarray=order, range=[-0.6, len(order) - 0.4])
    figure.update_yaxes(title_text="method", automargin=True, title_standoff=12, col=1)
    figure.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=_TOP + _BOTTOM + _ROW * (len(order) + 1),
        margin={"t": _TOP, "b": _BOTTOM, "r": 30},
        showlegend=False,
    )
    return figure


def _accuracy(table: pd.DataFrame) -> go.Scatter:
    return go.Scatter(
        x=table["accuracy"],
        y=table["method"],
        error_x={
            "array": table["high"] - table["accuracy"],
            "arrayminus": table["accuracy"] - table["low"],
            "thickness": 1.5,
            "width": 4,
        },
        mode="markers",
        marker={"color": BLUE, "size": 9},
        customdata=table[["low", "high"]],
        hovertemplate=(
            "%{y}: %{x:.1%} (%{customdata[0]:.1%} … %{customdata[1]:.1%})<extra></extra>"
        ),
    )


def _bounds(costs: pd.Series) -> tuple[float, float]:
    """Ends of a logarithmic axis with room for a zero at the left."""
    there = costs[costs > 0]
    if there.empty:
        return 1.0, 10.0
    return float(there.min()) / 3, float(there.max()) * 2


def _cost(names: pd.Series, costs: pd.Series, name: str, colour: str) -> go.Scatter:
    there = costs > 0
    return go.Scatter(
        x=costs[there],
        y=names[there],
        mode="markers",
        marker={"color": colour, "size": 9, "symbol": "square"},
        hovertemplate=f"%{{y}}: %{{x:,.4g}} {name}<extra></extra>",
    )


def _zeros(names: pd.Series, low: float, name: str) -> go.Scatter:
    return go.Scatter(
        x=np.full(len(names), low),
        y=names,
        mode="text",
        text=["0"] * len(names),
        hovertemplate=f"%{{y}}: 0 {name}<extra></extra>",
    )
