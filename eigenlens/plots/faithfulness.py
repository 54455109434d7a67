"""Estimates against exact effects, and faithfulness curves."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from eigenlens.faithfulness import STRATA, curve_areas
from eigenlens.plots.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SIGN,
    SKY,
    TEMPLATE,
    VERMILION,
    plain,
    signed_log,
    signed_log_ticks,
)

_UNIT = 1e-6
_STRATUM_COLOURS = (VERMILION, ORANGE, GREEN, SKY, BLUE)


def exact_against_estimate(
    estimate: np.ndarray, exact: np.ndarray, strata: np.ndarray | None = None
) -> go.Figure:
    """Exact effect of freezing a component against its estimate; on the diagonal they agree.

    Args:
        estimate: one per component, in nats.
        exact: mean exact effects of the same components.
        strata: stratum of each component (of :func:`eigenlens.faithfulness.stratified_sample`).

    Both axes are linear within ±1e-6 nats and logarithmic outside.
    """
    ticks, labels = signed_log_ticks(np.concatenate([estimate, exact]), _UNIT)
    ends = [ticks[0], ticks[-1]]
    figure = go.Figure()
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dot"}, name="equal"
    )
    groups = np.zeros(len(exact), dtype=int) if strata is None else strata
    for stratum in np.unique(groups):
        rows = groups == stratum
        figure.add_scatter(
            x=signed_log(estimate[rows], _UNIT),
            y=signed_log(exact[rows], _UNIT),
            mode="markers",
            marker={"color": _STRATUM_COLOURS[stratum % 5], "size": 7, "opacity": 0.7},
            name=_stratum(int(stratum)) if strata is not None else "components",
            customdata=np.stack([estimate[rows], exact[rows]], axis=1),
            hovertemplate="estimate %{customdata[0]:.3g}, exact %{customdata[1]:.3g} nats",
        )
    axis = {"tickvals": ticks, "ticktext": labels, "range": [ends[0] - 0.3, ends[1] + 0.3]}
    figure.update_layout(
        template=TEMPLATE,
        title=f"Exact effects against estimates<br><sup>{SIGN}</sup>",
        xaxis={**axis, "title": "estimated ΔL (nats)"},
        yaxis={**axis, "title": "exact ΔL (nats)"},
        width=620,
        height=560,
        margin={"t": 80},
    )
    return figure


def _stratum(number: int) -> str:
    start = 0.0 if number == 0 else STRATA[number - 1]
    return f"largest {STRATA[number]:.1%}" if not start else f"{start:.1%} … {STRATA[number]:.1%}"


def faithfulness(curves: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Normalised faithfulness against the share of components kept.

    Args:
        curves: by name, of :func:`eigenlens.faithfulness.faithfulness_curve`.
    """
    figure = go.Figure()
    for name, curve in curves.items():
        areas = curve_areas(curve)
        figure.add_scatter(
            x=curve["kept"],
            y=curve["faithfulness"],
            mode="lines+markers",
            name=f"{plain(name)} (CPR {areas['cpr']:.2f}, CMD {areas['cmd']:.2f})",
        )
    figure.add_hline(y=1, line={"color": GREY, "dash": "dot"})
    figure.update_layout(
        template=TEMPLATE,
        title="Faithfulness when only the highest scores are kept",
        xaxis={"title": "share of components kept, the others frozen", "tickformat": ".0%"},
        yaxis_title="faithfulness (0: all frozen, 1: none)",
        width=720,
        height=480,
        legend={"orientation": "h", "y": -0.22},
        margin={"b": 110},
    )
    return figure
