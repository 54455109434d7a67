"""The score spectrum: predicted effect of freezing against the index of the singular value."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.freezing import FrozenSet
from eigenlens.matrices import MATRIX_KINDS
from eigenlens.plots.style import GREY, SIGN, TEMPLATE, VERMILION, signed_log, signed_log_ticks
from eigenlens.scoring import Scores
from eigenlens.scoring.scores import COMPONENT

_MOST_POINTS = 3000
_UNIT = 1e-6
_PANEL, _GAP = 190, 100  # pixels


def spectrum(scores: Scores, frozen: FrozenSet | None = None) -> go.Figure:
    """Score of every component against its index, one panel per matrix kind.

    The axis is linear within ±1e-6 nats and logarithmic outside. Panels with more than 3,000
    components show the 1,000 highest, the 1,000 lowest and an even sample of the others.

    Args:
        scores: what to show.
        frozen: mark these components.
    """
    table = scores.to_pandas()
    table["frozen"] = False
    if frozen is not None:
        keys = pd.MultiIndex.from_frame(frozen.components[COMPONENT])
        table["frozen"] = pd.MultiIndex.from_frame(table[COMPONENT]).isin(keys)
    kinds = [kind for kind in MATRIX_KINDS if kind in set(table["matrix"])]
    columns = 2 if len(kinds) > 1 else 1
    rows = -(-len(kinds) // columns)
    inner = rows * _PANEL + (rows - 1) * _GAP
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[f"W<sub>{kind[2:]}</sub>" for kind in kinds],
        horizontal_spacing=0.12,
        vertical_spacing=_GAP / inner if rows > 1 else 0,
        shared_yaxes="all",
    )
    ticks, labels = signed_log_ticks(table["delta_loss"].to_numpy(), _UNIT)
    for place, kind in enumerate(kinds):
        shown = _thinned(table[table["matrix"] == kind])
        for state, colour in ((False, GREY), (True, VERMILION)):
            figure.add_trace(
                _points(shown[shown["frozen"] == state], state, colour, first=place == 0),
                row=place // columns + 1,
                col=place % columns + 1,
            )
    figure.update_xaxes(title_text="singular value index")
    figure.update_yaxes(
        title_text="ΔL (nats)", tickvals=ticks, ticktext=labels, showticklabels=True
    )
    top, bottom = 130, 60
    figure.update_layout(
        template=TEMPLATE,
        title={
            "text": f"Score spectrum, criterion {scores.criterion}<br><sup>{SIGN}</sup>",
            "y": 1 - 30 / (inner + top + bottom),
            "yanchor": "top",
        },
        height=inner + top + bottom,
        margin={"t": top, "b": bottom},
        legend={
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1 + 40 / inner,
            "yanchor": "bottom",
            "itemsizing": "constant",
        },
    )
    return figure


def _thinned(table: pd.DataFrame) -> pd.DataFrame:
    if len(table) <= _MOST_POINTS:
        return table
    third = _MOST_POINTS // 3
    ranked = table.sort_values("delta_loss")
    middle = ranked.iloc[third:-third]
    even = middle.iloc[np.linspace(0, len(middle) - 1, third).astype(int)]
    return pd.concat([ranked.iloc[:third], even, ranked.iloc[-third:]])


def _points(rows: pd.DataFrame, frozen: bool, colour: str, *, first: bool) -> go.Scattergl:
    errors = None
    if rows["stderr"].notna().any() and len(rows) <= 300:
        high = signed_log((rows["delta_loss"] + rows["stderr"]).to_numpy(), _UNIT)
        low = signed_log((rows["delta_loss"] - rows["stderr"]).to_numpy(), _UNIT)
        middle = signed_log(rows["delta_loss"].to_numpy(), _UNIT)
        errors = {"array": high - middle, "arrayminus": middle - low, "thickness": 1, "width": 0}
    return go.Scattergl(
        x=rows["index"],
        y=signed_log(rows["delta_loss"].to_numpy(), _UNIT),
        error_y=errors,
        mode="markers",
        name="frozen" if frozen else "kept",
        legendgroup=str(frozen),
        showlegend=first,
        marker={"color": colour, "size": 4, "opacity": 0.6},
        customdata=rows[["layer", "head", "delta_loss", "sigma"]],
        hovertemplate=(
            "layer %{customdata[0]}, head %{customdata[1]}, index %{x}<br>"
            "ΔL %{customdata[2]:.3g} nats, σ %{customdata[3]:.3g}<extra></extra>"
        ),
    )
