"""Predicted against measured effects of cutting paths and nodes of a circuit."""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.plots.style import BLUE, FULL_WIDTH, GREY, TEMPLATE, VERMILION, heading, plain

_MOST_ROWS = 60
_ROW, _TOP, _BOTTOM = 22, 105, 65  # pixels


def path_cuts(cut: pd.DataFrame) -> go.Figure:
    """A row per cut: what the graph predicted, and what an intervention measured.

    Args:
        cut: what :func:`eigenlens.cut_paths` returned.

    Raises:
        ValueError: no rows, or more than 60.
    """
    if not 1 <= len(cut) <= _MOST_ROWS:
        raise ValueError(f"{len(cut)} cuts: show between 1 and {_MOST_ROWS}.")
    rows = cut.sort_values("measured", ascending=False)
    names = [
        plain(f"{row.writer} → {row.reader}" if row.cut == "edge" else f"{row.writer}, all paths")
        for row in rows.itertuples()
    ]
    figure = go.Figure()
    for name, predicted, measured in zip(names, rows["predicted"], rows["measured"], strict=True):
        figure.add_trace(
            go.Scatter(
                x=[predicted, measured],
                y=[name, name],
                mode="lines",
                line={"color": GREY, "width": 1.5},
                hoverinfo="skip",
                showlegend=False,
            )
        )
    for column, colour, symbol, text in (
        ("predicted", BLUE, "circle-open", "predicted by the graph (first order)"),
        ("measured", VERMILION, "circle", "measured by cutting"),
    ):
        figure.add_trace(
            go.Scatter(
                x=rows[column],
                y=names,
                mode="markers",
                marker={"color": colour, "size": 9, "symbol": symbol, "line": {"width": 2}},
                name=text,
                hovertemplate="%{y}<br>" + column + " %{x:.4g} nats<extra></extra>",
            )
        )
    height = _TOP + _BOTTOM + _ROW * (len(rows) + 1)
    figure.update_xaxes(title_text="change of the loss (nats)", zeroline=True, zerolinewidth=2)
    figure.update_yaxes(
        title_text="what is cut",
        automargin=True,
        tickfont={"size": 12},
        range=[-0.7, len(rows) - 0.3],
    )
    strengths = cut["strength"].unique()
    note = "below zero, the cut lowers the loss" + (
        f"; strength {strengths[0]:g}" if len(strengths) == 1 and strengths[0] != 1 else ""
    )
    figure.update_layout(
        template=TEMPLATE,
        title=heading("Cut paths: predicted and measured", note, height),
        width=FULL_WIDTH,
        height=height,
        margin={"t": _TOP, "b": _BOTTOM, "r": 30},
        legend={
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1 + 6 / (height - _TOP - _BOTTOM),
            "yanchor": "bottom",
        },
    )
    return figure
