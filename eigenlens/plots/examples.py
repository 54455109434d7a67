"""The loss of every example before and after an edit."""

import numpy as np
import plotly.graph_objects as go

from eigenlens.evaluation import Evaluation
from eigenlens.plots.style import BLUE, FULL_WIDTH, GREEN, GREY, TEMPLATE, VERMILION, plain

# Name of each outcome, its colour and symbol: whether it was right before, and after.
OUTCOMES = {
    (True, True): ("right both times", BLUE, "circle-open"),
    (False, False): ("wrong both times", GREY, "x-thin-open"),
    (False, True): ("gained", GREEN, "triangle-up"),
    (True, False): ("lost", VERMILION, "triangle-down"),
}
_FLOOR = 1e-4  # nats: smaller losses are drawn there


def example_losses(before: Evaluation, after: Evaluation) -> go.Figure:
    """Loss after against loss before, one mark an example; below the diagonal it has fallen.

    Args:
        before: of the unedited model. Losses below 1e-4 nats are drawn there.
        after: of the same examples.
    """
    was, now = (e.examples["correct"].to_numpy(bool) for e in (before, after))
    x, y = (np.maximum(e.examples["loss"].to_numpy(), _FLOOR) for e in (before, after))
    ends = [min(x.min(), y.min()) / 1.5, max(x.max(), y.max()) * 1.5]
    figure = go.Figure()
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot"}, name="unchanged"
    )
    for (right, still), (name, colour, symbol) in OUTCOMES.items():
        rows = (was == right) & (now == still)
        figure.add_scatter(
            x=x[rows],
            y=y[rows],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9, "opacity": 0.8},
            name=f"{name} ({rows.sum()})",
            text=after.examples.loc[rows, "prompt"].map(plain),
            hovertemplate="%{text}<br>%{x:.3g} → %{y:.3g} nats<extra></extra>",
        )
    axis = {"type": "log", "dtick": 1, "exponentformat": "power"}
    figure.update_layout(
        template=TEMPLATE,
        xaxis={**axis, "title": "loss before (nats per answer)"},
        yaxis={**axis, "title": "loss after (nats per answer)"},
        width=FULL_WIDTH,
        height=480,
        margin={"t": 30, "b": 120},
        legend={"orientation": "h", "y": -0.24, "x": 0.5, "xanchor": "center"},
    )
    return figure
