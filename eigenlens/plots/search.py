"""The trace of a search: validation accuracy and loss, and how much is edited, by step."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.plots.style import BLUE, GREEN, ORANGE, TEMPLATE, VERMILION, plain
from eigenlens.search import SearchResult

_LOSSES = {
    "validation_loss": ("validation loss", ORANGE),
    "train_loss": ("minibatch loss", GREEN),
    "calibration_loss": ("calibration loss", GREEN),
}


def search_trace(result: SearchResult) -> go.Figure:
    """Accuracy, losses and number of components against the step; the chosen step is marked.

    Args:
        result: of any search.
    """
    trace = result.trace
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    figure.add_trace(
        _line(trace["step"], trace["validation_accuracy"], "validation accuracy", BLUE),
        row=1,
        col=1,
    )
    for column, (name, colour) in _LOSSES.items():
        if column in trace:
            figure.add_trace(_line(trace["step"], trace[column], name, colour), row=2, col=1)
    figure.add_trace(
        _line(trace["step"], trace["components"], "components", VERMILION), row=3, col=1
    )
    most = max(1, trace["components"].max())
    chosen = trace.loc[trace["chosen"], "step"].iloc[0]
    figure.add_vline(x=chosen, line={"color": "#444444", "dash": "dot", "width": 1.5})
    figure.update_yaxes(title_text="accuracy", tickformat=".0%", range=[-0.03, 1.03], row=1)
    figure.update_yaxes(title_text="loss (nats)", rangemode="tozero", row=2)
    figure.update_yaxes(
        title_text=f"components<br>{plain(result.frozen.edit)}",
        range=[-0.03 * most, 1.05 * most],
        row=3,
    )
    if trace["step"].max() < 10:  # no fractions of a step, and none below 0
        figure.update_xaxes(dtick=1, range=[-0.5, trace["step"].max() + 0.5])
    figure.update_xaxes(title_text="step (dotted: chosen on validation)", row=3)
    figure.update_layout(
        template=TEMPLATE,
        title=f"Search: {plain(result.method)}",
        width=760,
        height=620,
        legend={"orientation": "h", "y": -0.13},
        margin={"b": 100},
    )
    return figure


def _line(x: object, y: object, name: str, colour: str) -> go.Scatter:
    return go.Scatter(
        x=x, y=y, mode="lines+markers", name=name, line={"color": colour}, marker={"size": 5}
    )
