"""Singular values against the end of the noise bulk, with the frozen ones marked."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.frozen_set import FrozenSet
from eigenlens.marchenko_pastur import bulk_edge
from eigenlens.matrices import MATRIX_KINDS
from eigenlens.plots.style import (
    FULL_WIDTH,
    GREY,
    TEMPLATE,
    VERMILION,
    bends,
    heading,
    kind_label,
    log_ticks,
)
from eigenlens.spectra import Spectra, Spectrum

_PANEL, _GAP = 190, 100  # pixels
_MOST_POINTS, _FEWEST = 6000, 8  # of all lines of a panel, of one line


def singular_values(
    spectra: Spectra, frozen: FrozenSet | None = None, layers: Iterable[int] | None = None
) -> go.Figure:
    """Every singular value in units of its matrix's bulk edge, one line per layer and head.

    The dashed line at 1 is the Marchenko–Pastur edge ``s (√d_in + √d_out)``, where ``s`` is
    estimated from the median singular value (:mod:`eigenlens.marchenko_pastur`): values below it
    look like noise of that strength. Where the lines of a panel have more than 6,000 points, each
    keeps its ends and as many points between, evenly along its length, as fit.

    Args:
        spectra: what to show; singular values, since the edge is that of no other basis.
        frozen: mark these components.
        layers: show only these.

    Raises:
        ValueError: another basis than ``svd``; none of ``layers`` is among the spectra.
    """
    if spectra.basis != "svd":
        raise ValueError(
            f"These spectra are of the basis {spectra.basis}: the bulk edge is that of singular "
            "values of one matrix, those of eigenlens.decompose(model, basis='svd')."
        )
    wanted = None if layers is None else set(layers)
    shown = [s for s in spectra.values() if wanted is None or s.site.layer in wanted]
    if not shown:
        raise ValueError(f"None of the layers {sorted(wanted or ())} is among the spectra.")
    kinds = [kind for kind in MATRIX_KINDS if any(s.site.kind == kind for s in shown)]
    columns = 2 if len(kinds) > 1 else 1
    rows = -(-len(kinds) // columns)
    inner = rows * _PANEL + (rows - 1) * _GAP
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[kind_label(kind) for kind in kinds],
        horizontal_spacing=0.12,
        vertical_spacing=_GAP / inner if rows > 1 else 0,
    )
    for place, kind in enumerate(kinds):
        table = pd.concat([_values(s) for s in shown if s.site.kind == kind], ignore_index=True)
        at = {"row": place // columns + 1, "col": place % columns + 1}
        figure.add_trace(_lines(table, first=place == 0), **at)
        there = table["ratio"][table["ratio"] > 0]
        marks, texts = log_ticks(float(there.min()), float(there.max()))
        figure.update_yaxes(tickvals=marks, ticktext=texts, **at)
        figure.add_trace(_edge(table, first=place == 0), **at)
        if frozen is not None:
            figure.add_trace(_marks(table, frozen, kind, first=place == 0), **at)
    figure.update_xaxes(title_text="singular value index")
    figure.update_yaxes(title_text="σ / bulk edge", type="log", showticklabels=True)
    top, bottom = 130, 60
    figure.update_layout(
        template=TEMPLATE,
        title=heading(
            "Singular values and the Marchenko–Pastur bulk",
            "edge = s (√d<sub>in</sub> + √d<sub>out</sub>), noise s from the median singular value",
            inner + top + bottom,
        ),
        width=FULL_WIDTH,
        height=inner + top + bottom,
        margin={"t": top, "b": bottom},
        legend={
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1 + 40 / inner,
            "yanchor": "bottom",
        },
    )
    return figure


def _values(spectrum: Spectrum) -> pd.DataFrame:
    """One row per component: ``layer, matrix, head, index, sigma, ratio``."""
    sigma = spectrum.sigma.cpu().double().numpy()
    edge = bulk_edge(sigma, spectrum.site.width, spectrum.site.far_width)
    heads, rank = sigma.shape
    return pd.DataFrame(
        {
            "layer": spectrum.site.layer,
            "matrix": spectrum.site.kind,
            "head": np.repeat(np.arange(heads), rank),
            "index": np.tile(np.arange(rank), heads),
            "sigma": sigma.flatten(),
            # A matrix of less than half rank has a median of zero and no bulk to compare with.
            "ratio": (sigma / np.where(edge > 0, edge, np.nan)[:, None]).flatten(),
        }
    )


_HOVER = (
    "layer %{customdata[0]}, head %{customdata[1]}, index %{x}<br>"
    "σ %{customdata[2]:.3g}, %{y:.3g} of the edge<extra></extra>"
)
_DETAILS = ["layer", "head", "sigma"]


def _lines(table: pd.DataFrame, *, first: bool) -> go.Scattergl:
    """All heads as one trace, with a gap between two lines."""
    groups = table.groupby(["layer", "head"])
    most = max(_FEWEST, _MOST_POINTS // groups.ngroups)
    parts = []
    for _, own in groups:
        height = np.log10(own["ratio"].fillna(0).clip(1e-12).to_numpy())  # zero is drawn nowhere
        parts += [own.iloc[bends(height, most)], pd.DataFrame([{}])]
    lines = pd.concat(parts, ignore_index=True)
    return go.Scattergl(
        x=lines["index"],
        y=lines["ratio"],
        mode="lines",
        line={"color": GREY, "width": 1},
        opacity=0.6,
        connectgaps=False,
        name="a matrix or head",
        legendgroup="all",
        showlegend=first,
        customdata=lines[_DETAILS],
        hovertemplate=_HOVER,
    )


def _edge(table: pd.DataFrame, *, first: bool) -> go.Scatter:
    return go.Scatter(
        x=[0, table["index"].max()],
        y=[1, 1],
        mode="lines",
        line={"color": "#222222", "dash": "dash", "width": 1.5},
        name="bulk edge",
        legendgroup="edge",
        showlegend=first,
        hoverinfo="skip",
    )


def _marks(table: pd.DataFrame, frozen: FrozenSet, kind: str, *, first: bool) -> go.Scattergl:
    own = frozen.components[frozen.components["matrix"] == kind]
    found = table.merge(own, on=["layer", "matrix", "head", "index"])
    return go.Scattergl(
        # An empty trace draws no legend entry: the first panel always has one point.
        x=found["index"] if len(found) else [None],
        y=found["ratio"] if len(found) else [None],
        mode="markers",
        marker={"color": VERMILION, "size": 6},
        name="frozen",
        legendgroup="frozen",
        showlegend=first,
        customdata=found[_DETAILS],
        hovertemplate=_HOVER,
    )
