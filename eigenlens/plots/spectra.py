"""The score spectrum: predicted effect of freezing against a component's index or σ."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.bases import SINGULAR
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import KINDS, MLP_KINDS
from eigenlens.plots.style import (
    FULL_WIDTH,
    GREY,
    SIGN,
    TEMPLATE,
    VERMILION,
    heading,
    kind_label,
    log_ticks,
    plain,
    signed_log,
    signed_log_ticks,
    visible,
)
from eigenlens.scoring import Scores
from eigenlens.spectra import COMPONENT

Against = Literal["index", "sigma"]

_MOST_BARS = 300
_MOST_PANELS = 32
_UNIT = 1e-6
_PANEL, _GAP, _TOP, _BOTTOM = 190, 100, 130, 60  # pixels
_TITLES = {"index": "singular value index", "sigma": "singular value σ"}
_OTHER_TITLES = {"index": "component index", "sigma": "length σ of the matrix along it"}


def spectrum(
    scores: Scores,
    frozen: FrozenSet | None = None,
    *,
    against: Against | str = "index",
    matrix: str | None = None,
    layer: int | None = None,
) -> go.Figure:
    """Score of every component against its index or its σ.

    One panel per matrix kind or, with ``matrix``, one per layer and head of that kind. The ΔL axis
    is linear within ±1e-6 nats and logarithmic outside. Bars are standard errors over examples,
    where they were computed and a panel shows at most 300 of a colour. Of more than 1,000 kept
    components of a panel, or frozen ones, those that others of their colour cover are left out.

    Args:
        scores: what to show.
        frozen: mark these components.
        against: ``index``, or ``sigma`` on a logarithmic axis (where σ = 0 has no place).
        matrix: show only this kind, head by head.
        layer: show only this layer.

    Raises:
        ValueError: no such scores, an unknown ``against``, or more than 32 panels.
    """
    if against not in _TITLES:
        raise ValueError(f"Unknown against={against!r}; choose from {', '.join(_TITLES)}.")
    table = _chosen(scores, frozen, matrix, layer)
    panels = dict(_by_kind(table) if matrix is None else _by_head(table))
    if len(panels) > _MOST_PANELS:
        raise ValueError(f"{len(panels)} panels are more than {_MOST_PANELS}: give layer=.")
    columns = min(len(panels), 2 if matrix is None else 4)
    rows = -(-len(panels) // columns)
    inner = rows * _PANEL + (rows - 1) * _GAP
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=list(panels),
        horizontal_spacing=0.12 if columns == 2 else 0.06,
        vertical_spacing=_GAP / inner if rows > 1 else 0,
        shared_yaxes="all",
    )
    for place, own in enumerate(panels.values()):
        for state, colour in ((False, GREY), (True, VERMILION)):
            figure.add_trace(
                _points(own[own["frozen"] == state], against, state, colour, first=place == 0),
                row=place // columns + 1,
                col=place % columns + 1,
            )
    ticks, labels = signed_log_ticks(table["delta_loss"].to_numpy(), _UNIT)
    titles = _TITLES if scores.basis in SINGULAR else _OTHER_TITLES
    figure.update_xaxes(title_text=titles[against], type="log" if against == "sigma" else "linear")
    figure.update_yaxes(tickvals=ticks, ticktext=labels, showticklabels=columns == 2)
    figure.update_yaxes(showticklabels=True, title_text="ΔL (nats)", col=1)
    if columns == 2:
        figure.update_yaxes(title_text="ΔL (nats)")
    if against == "sigma":
        sigma = table["sigma"][table["sigma"] > 0]
        marks, texts = log_ticks(float(sigma.min()), float(sigma.max()))
        figure.update_xaxes(tickvals=marks, ticktext=texts)
    figure.update_layout(
        template=TEMPLATE,
        title=heading(
            f"Score spectrum, criterion {plain(scores.criterion)}",
            SIGN,
            inner + _TOP + _BOTTOM,
        ),
        width=FULL_WIDTH,
        height=inner + _TOP + _BOTTOM,
        margin={"t": _TOP, "b": _BOTTOM},
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


def _chosen(
    scores: Scores, frozen: FrozenSet | None, matrix: str | None, layer: int | None
) -> pd.DataFrame:
    table = scores.to_pandas().assign(frozen=False)
    if frozen is not None:
        keys = pd.MultiIndex.from_frame(frozen.components[COMPONENT])
        table["frozen"] = pd.MultiIndex.from_frame(table[COMPONENT]).isin(keys)
    for name, wanted in (("matrix", matrix), ("layer", layer)):
        if wanted is None:
            continue
        if wanted not in set(table[name]):
            known = ", ".join(str(value) for value in table[name].unique())
            raise ValueError(f"No scores of {name} {wanted!r}; there are {known}.")
        table = table[table[name] == wanted]
    return table


def _by_kind(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for kind in KINDS:
        if len(own := table[table["matrix"] == kind]):
            yield kind_label(kind), own


def _by_head(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    name = kind_label(table["matrix"].iloc[0])
    for (layer, head), own in table.groupby(["layer", "head"]):
        in_mlp = own["matrix"].iloc[0] in MLP_KINDS
        yield f"layer {layer}, {name}" + ("" if in_mlp else f", head {head}"), own


def _points(
    rows: pd.DataFrame, against: str, frozen: bool, colour: str, *, first: bool
) -> go.Scattergl:
    x = rows[against].to_numpy(float)
    shown = visible(
        np.log10(x, where=x > 0, out=np.full_like(x, np.nan)) if against == "sigma" else x,
        signed_log(rows["delta_loss"].to_numpy(), _UNIT),
    )
    rows = rows.iloc[shown]
    errors, known = None, rows["stderr"].notna().any()
    middle = signed_log(rows["delta_loss"].to_numpy(), _UNIT)
    if known and len(rows) <= _MOST_BARS:
        high = signed_log((rows["delta_loss"] + rows["stderr"]).to_numpy(), _UNIT)
        low = signed_log((rows["delta_loss"] - rows["stderr"]).to_numpy(), _UNIT)
        errors = {"array": high - middle, "arrayminus": middle - low, "thickness": 1, "width": 0}
    return go.Scattergl(
        # An empty trace draws no legend entry: the first panel always has one point.
        x=rows[against] if len(rows) else [None],
        y=middle if len(rows) else [None],
        error_y=errors,
        mode="markers",
        name="frozen" if frozen else "kept",
        legendgroup=str(frozen),
        showlegend=first,
        marker={"color": colour, "size": 6 if frozen else 4, "opacity": 0.9 if frozen else 0.6},
        customdata=rows[["layer", "head", "index", "delta_loss", "stderr", "sigma"]],
        hovertemplate=(
            "layer %{customdata[0]}, head %{customdata[1]}, index %{customdata[2]}<br>"
            f"ΔL %{{customdata[3]:.3g}}{' ± %{customdata[4]:.2g}' if known else ''} nats, "
            "σ %{customdata[5]:.3g}<extra></extra>"
        ),
    )
