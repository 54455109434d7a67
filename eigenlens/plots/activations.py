"""Activations before and after an edit."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.activations import ActivationChange
from eigenlens.plots.style import BLUE, FULL_WIDTH, GREY, LESS_MORE, TEMPLATE, heading

_STATES = (("before", GREY, "dot"), ("after", BLUE, "solid"))


def activation_change(change: ActivationChange) -> go.Figure:
    """Residual stream, heads, MLPs and the logit lens before and after an edit, in six panels.

    Args:
        change: what :func:`eigenlens.activation_change` returned.
    """
    figure = make_subplots(
        rows=3,
        cols=2,
        horizontal_spacing=0.24,
        vertical_spacing=0.12,
        subplot_titles=[
            "residual stream: cosine with itself",
            "residual stream: norm after / before",
            "head output norm after / before, position −1",
            "MLP output norm, position −1",
            "logit lens: right answer, position −1",
            "logit lens: right answer on top, position −1",
        ],
    )
    residual, heads = change.residual, change.heads[change.heads["position"] == -1]
    cosine = residual.pivot(index="depth", columns="position", values="cosine")
    lowest = min(float(cosine.to_numpy().min()), 0.999)
    _heat(figure, cosine, 1, 1, "cosine", zmin=lowest, zmax=1, colorscale="Viridis")
    _ratio(figure, residual, "depth", "position", 1, 2)
    _ratio(figure, heads, "layer", "head", 2, 1)
    mlp = change.mlp[change.mlp["position"] == -1]
    for row, col, table, x, columns in (
        (2, 2, mlp, "layer", "norm"),
        (3, 1, change.lens, "depth", "logprob"),
        (3, 2, change.lens, "depth", "top"),
    ):
        for state, colour, dash in _STATES:
            figure.add_trace(
                go.Scatter(
                    x=table[x],
                    y=table[f"{columns}_{state}"],
                    mode="lines+markers",
                    line={"color": colour, "dash": dash, "width": 2},
                    marker={"size": 7},
                    name=state,
                    legendgroup=state,
                    showlegend=(row, col) == (2, 2),
                ),
                row=row,
                col=col,
            )
    titles = [
        [("position (−1: last of the prompt)", "depth (blocks passed)")] * 2,
        [("head", "layer"), ("layer", "norm (activation units)")],
        [
            ("depth (blocks passed)", "log-probability (nats)"),
            ("depth (blocks passed)", "share of examples"),
        ],
    ]
    for i, line in enumerate(titles, start=1):
        for j, (x, y) in enumerate(line, start=1):
            figure.update_xaxes(title_text=x, row=i, col=j)
            figure.update_yaxes(title_text=y, row=i, col=j)
    n_layers = change.mlp["layer"].nunique()
    step = max(1, n_layers // 6)
    for row, col in ((2, 2), (3, 1), (3, 2)):
        figure.update_xaxes(dtick=step, row=row, col=col)
    for row, col in ((1, 1), (1, 2), (2, 1)):
        figure.update_yaxes(dtick=step, zeroline=False, showgrid=False, row=row, col=col)
        figure.update_xaxes(zeroline=False, showgrid=False, row=row, col=col)
    figure.update_xaxes(dtick=1, row=2, col=1)
    figure.update_yaxes(tickformat=".0%", range=[-0.03, 1.05], row=3, col=2)
    figure.update_layout(
        template=TEMPLATE,
        title=heading(
            "Activations before and after the edit",
            f"means over {change.n_examples} examples",
            1080,
        ),
        width=FULL_WIDTH,
        height=1080,
        margin={"l": 70, "r": 60, "t": 120, "b": 60},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.06, "yanchor": "bottom"},
    )
    figure.update_annotations(font_size=14)
    return figure


def _ratio(figure: go.Figure, table: pd.DataFrame, y: str, x: str, row: int, col: int) -> None:
    """Heatmap of a norm after by before, on a scale symmetric in the logarithm."""
    table = table.assign(ratio=np.log2(table["norm_after"] / table["norm_before"]))
    values = table.pivot(index=y, columns=x, values="ratio")
    widest = max(float(np.nanmax(np.abs(values.to_numpy()))), 0.01)
    ticks = np.linspace(-widest, widest, 5)
    _heat(
        figure,
        values,
        row,
        col,
        "ratio",
        zmin=-widest,
        zmax=widest,
        colorscale=LESS_MORE,
        text=np.exp2(values.to_numpy()),
        tickvals=ticks,
        ticktext=[f"{2**tick:.3g}" for tick in ticks],
    )


def _heat(
    figure: go.Figure,
    values: pd.DataFrame,
    row: int,
    col: int,
    name: str,
    *,
    text: np.ndarray | None = None,
    tickvals: np.ndarray | None = None,
    ticktext: list[str] | None = None,
    **scale: object,
) -> None:
    """A heatmap whose colour bar stands beside its own panel."""
    place = figure.get_subplot(row, col)
    right, (low, high) = place.xaxis.domain[1], place.yaxis.domain
    figure.add_trace(
        go.Heatmap(
            z=values.to_numpy(),
            x=values.columns,
            y=values.index,
            customdata=values.to_numpy() if text is None else text,
            hovertemplate=(
                f"{values.index.name} %{{y}}, {values.columns.name} %{{x}}<br>"
                f"{name} %{{customdata:.4g}}<extra></extra>"
            ),
            colorbar={
                "x": right + 0.01,
                "y": (low + high) / 2,
                "len": high - low,
                "thickness": 12,
                "tickvals": tickvals,
                "ticktext": ticktext,
                "tickfont": {"size": 12},
            },
            xgap=1,
            ygap=1,
            **scale,
        ),
        row=row,
        col=col,
    )
