"""Where the frozen components are: a map of layer against matrix and head."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import KINDS
from eigenlens.plots.style import FULL_WIDTH, HARM_HELP, SIGN, TEMPLATE, heading, kind_label
from eigenlens.scoring import Scores
from eigenlens.spectra import COMPONENT

_GAP, _TOP, _BOTTOM = 75, 95, 65  # pixels
_CELL = ["layer", "matrix", "head"]


def pruned_map(frozen: FrozenSet, scores: Scores | None = None) -> go.Figure:
    """Share of the components of every head and MLP map that is frozen, and their summed score.

    Args:
        frozen: what to show; an attenuated component counts with its strength.
        scores: add a panel with the sum of ``ΔL`` over the frozen components of each cell, and take
            the number of components of each cell from here.

    Raises:
        ValueError: neither scores nor a frozen set that knows its decomposition (one that was
            loaded from a file does not).
    """
    if scores is not None:
        candidates = scores.to_pandas()
    elif frozen.spectra is not None:
        candidates = frozen.spectra.to_pandas().assign(delta_loss=np.nan)
    else:
        raise ValueError("This FrozenSet was loaded from a file: pass scores= to count components.")
    strength = frozen.components.set_index(COMPONENT)["strength"]
    keys = pd.MultiIndex.from_frame(candidates[COMPONENT])
    candidates = candidates.assign(strength=strength.reindex(keys).fillna(0.0).to_numpy())
    candidates["sum"] = candidates["delta_loss"] * (candidates["strength"] > 0)
    cells = candidates.groupby(_CELL).agg(
        share=("strength", "mean"),
        n=("strength", "size"),
        frozen=("strength", lambda z: int((z > 0).sum())),
        sum=("sum", "sum"),
    )
    columns = _columns(cells)
    panels = 2 if scores is not None else 1
    n_layers = cells.index.get_level_values("layer").nunique()
    panel = int(np.clip(26 * n_layers, 120, 420))
    inner = panels * panel + (panels - 1) * _GAP
    height = inner + _TOP + _BOTTOM
    length = panel / inner
    figure = make_subplots(
        rows=panels,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=_GAP / inner if panels > 1 else 0,
        subplot_titles=["share of components frozen", f"summed score of the frozen ({SIGN})"][
            :panels
        ],
    )
    share = _grid(cells, columns, "share")
    figure.add_trace(
        _heatmap(
            cells,
            columns,
            share,
            "share",
            zmin=0,
            zmax=float(np.nanmax([1e-9, np.nanmax(share)])),
            colorscale="Viridis",
            y=1 - length / 2,
            length=length,
            tickformat=".2~%",
        ),
        row=1,
        col=1,
    )
    if scores is not None:
        total = _grid(cells, columns, "sum")
        widest = float(np.nanmax(np.abs(total))) or 1.0
        figure.add_trace(
            _heatmap(
                cells,
                columns,
                total,
                "ΔL (nats)",
                zmin=-widest,
                zmax=widest,
                colorscale=HARM_HELP,
                y=length / 2,
                length=length,
                tickformat=".2~g",
            ),
            row=2,
            col=1,
        )
    ticks = [np.mean([i for i, c in enumerate(columns) if c[0] == k]) for k in _kinds(columns)]
    figure.update_xaxes(
        tickvals=ticks,
        ticktext=[kind_label(kind) for kind in _kinds(columns)],
        showticklabels=True,
        showgrid=False,
        zeroline=False,
    )
    figure.update_xaxes(title_text="matrix (one column per head)", row=panels, col=1)
    step = max(1, n_layers // 12)
    figure.update_yaxes(title_text="layer", dtick=step, showgrid=False, zeroline=False)
    for edge in _edges(columns):
        figure.add_vline(x=edge, line={"color": "#FFFFFF", "width": 3})
    text = f"{len(frozen):,} of {len(candidates):,} components frozen"
    figure.update_layout(
        template=TEMPLATE,
        title=heading(text, "", height),
        width=FULL_WIDTH,
        height=height,
        margin={"t": _TOP, "b": _BOTTOM, "l": 70, "r": 30},
    )
    return figure


def _columns(cells: pd.DataFrame) -> list[tuple[str, int]]:
    found = set(zip(cells.index.get_level_values(1), cells.index.get_level_values(2), strict=True))
    return sorted(found, key=lambda c: (KINDS.index(c[0]), c[1]))


def _kinds(columns: list[tuple[str, int]]) -> list[str]:
    return list(dict.fromkeys(kind for kind, _ in columns))


def _edges(columns: list[tuple[str, int]]) -> list[float]:
    """Between the columns of two matrices."""
    return [i + 0.5 for i in range(len(columns) - 1) if columns[i][0] != columns[i + 1][0]]


def _layers(cells: pd.DataFrame) -> list[int]:
    return sorted(cells.index.get_level_values("layer").unique())


def _grid(cells: pd.DataFrame, columns: list[tuple[str, int]], name: str) -> np.ndarray:
    wide = cells[name].unstack(["matrix", "head"])
    return wide.reindex(index=_layers(cells), columns=pd.MultiIndex.from_tuples(columns)).to_numpy()


def _heatmap(
    cells: pd.DataFrame,
    columns: list[tuple[str, int]],
    values: np.ndarray,
    title: str,
    *,
    y: float,
    length: float,
    tickformat: str,
    **scale: object,
) -> go.Heatmap:
    details = np.stack([_grid(cells, columns, name) for name in ("frozen", "n")], axis=-1)
    names = np.array([f"{kind}, head {head}" for kind, head in columns])
    text = np.broadcast_to(names, values.shape)
    return go.Heatmap(
        z=values,
        y=_layers(cells),
        customdata=details,
        text=text,
        hovertemplate=(
            "layer %{y}, %{text}<br>%{customdata[0]} of %{customdata[1]} frozen<br>"
            f"{title} %{{z:.3g}}<extra></extra>"
        ),
        colorbar={
            "title": {"text": title, "side": "right"},
            "y": y,
            "len": length,
            "thickness": 14,
            "tickformat": tickformat,
        },
        xgap=1,
        ygap=1,
        **scale,
    )
