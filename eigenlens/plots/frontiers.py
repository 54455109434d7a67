"""Accuracy on the task against harm to other text."""

from itertools import cycle

import plotly.graph_objects as go

from eigenlens.frontiers import Frontier
from eigenlens.plots.style import BLUE, GREEN, ORANGE, PINK, SKY, TEMPLATE, VERMILION, plain

_COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PINK, SKY)


def frontier(found: Frontier) -> go.Figure:
    """Every edit at its strengths on validation, and what is on the frontier on the test split.

    Args:
        found: what :func:`eigenlens.frontier` returned.
    """
    figure = go.Figure()
    edits = [name for name in found.table["edit"].unique() if name != "none"]
    for name, colour in zip(edits, cycle(_COLOURS), strict=False):
        own = found.table[found.table["edit"] == name].sort_values("strength")
        figure.add_trace(
            go.Scatter(
                x=own["harm"],
                y=own["accuracy"],
                text=[f"strength {s:g}" for s in own["strength"]],
                name=f"{plain(name)}, validation",
                mode="lines+markers",
                line={"color": colour, "width": 1, "dash": "dot"},
                marker={"symbol": "circle-open", "size": 7},
            )
        )
        shown = own.dropna(subset="test_harm")
        figure.add_trace(
            go.Scatter(
                x=shown["test_harm"],
                y=shown["test_accuracy"],
                text=[f"strength {s:g}" for s in shown["strength"]],
                name=f"{plain(name)}, test",
                mode="markers",
                marker={"color": colour, "size": 9},
            )
        )
    figure.add_vline(
        x=found.bound,
        line={"color": "#444444", "dash": "dot", "width": 1.5},
        annotation_text="bound",
    )
    figure.update_yaxes(title_text="accuracy", tickformat=".0%", range=[-0.03, 1.03])
    figure.update_xaxes(title_text="harm: rise of the loss on text (nats per token)")
    figure.update_layout(template=TEMPLATE, width=760, height=460)
    return figure
