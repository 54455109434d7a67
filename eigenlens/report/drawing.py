"""Figures of the report as HTML that needs nothing but the page's own plotly.js."""

import plotly.graph_objects as go

_MOST_SVG_POINTS = 12_000  # SVG prints sharply everywhere; above this, WebGL keeps phones quick


def fragment(figure: go.Figure, name: str) -> str:
    """A ``div`` and the script that draws the figure in it.

    Drawn as wide as the page allows. Dragging scrolls the page, as a finger on a phone expects.

    Args:
        figure: of :mod:`eigenlens.plots`.
        name: ``id`` of the element.
    """
    drawn = _as_svg(go.Figure(figure))
    drawn.update_layout(autosize=True, width=None, dragmode=False)
    html: str = drawn.to_html(
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        div_id=name,
        default_height=f"{figure.layout.height}px",
        config={"responsive": True, "displaylogo": False, "displayModeBar": False},
    )
    return html


def _as_svg(figure: go.Figure) -> go.Figure:
    points = sum(len(trace.x) for trace in figure.data if trace.type == "scattergl")
    if points > _MOST_SVG_POINTS:
        return figure
    traces = [
        go.Scatter({k: v for k, v in trace.to_plotly_json().items() if k != "type"})
        if trace.type == "scattergl"
        else trace
        for trace in figure.data
    ]
    return go.Figure(traces, figure.layout)
