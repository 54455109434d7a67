"""What an edit that was learned on one task does to others."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from eigenlens.plots.style import FULL_WIDTH, HARM_HELP, TEMPLATE, plain

_COLUMNS = ("learned_on", "tested_on", "change")
_CELL, _TOP, _BOTTOM = 58, 20, 75  # pixels


def transfer(table: pd.DataFrame) -> go.Figure:
    """Change of accuracy on every task, by the task that the edit was learned on.

    Blue is better than the unedited model, vermilion worse.

    Args:
        table: one row per pair with ``learned_on``, ``tested_on``, the ``change`` of accuracy as a
            share (after − before), and if known its interval's ends ``low`` and ``high``. Rows and
            columns keep the table's order.

    Raises:
        ValueError: a missing column, no rows, or a pair that comes twice.
    """
    missing = [name for name in _COLUMNS if name not in table]
    if missing:
        raise ValueError(f"The table of transfer lacks the columns {', '.join(missing)}.")
    if table.empty:
        raise ValueError("The table of transfer has no rows.")
    pairs = table[["learned_on", "tested_on"]]
    if pairs.duplicated().any():
        twice = pairs[pairs.duplicated()].iloc[0].to_list()
        raise ValueError(f"The pair {twice} comes twice: add up its rows first.")
    learned, tested = (table[name].map(plain) for name in pairs)
    table = table.assign(learned_on=learned, tested_on=tested)
    change = _grid(table, "change")
    widest = max(float(np.nanmax(np.abs(change))), 0.01)
    figure = go.Figure(
        go.Heatmap(
            z=100 * change.to_numpy(),
            x=change.columns,
            y=change.index,
            zmin=-100 * widest,
            zmax=100 * widest,
            colorscale=HARM_HELP,
            xgap=2,
            ygap=2,
            text=_texts(table),
            texttemplate="%{text}",
            textfont={"size": 13},
            hovertemplate=(
                "learned on %{y}, tested on %{x}: %{z:+.1f} percentage points<extra></extra>"
            ),
            colorbar={
                "title": {"text": "change of accuracy (points)", "side": "right"},
                "thickness": 14,
                "ticksuffix": "",
            },
        )
    )
    figure.update_xaxes(title_text="tested on", showgrid=False, automargin=True)
    figure.update_yaxes(
        title_text="learned on", showgrid=False, automargin=True, autorange="reversed"
    )
    figure.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=max(260, _TOP + _BOTTOM + _CELL * len(change)),
        margin={"t": _TOP, "b": _BOTTOM, "r": 30},
    )
    return figure


def _grid(table: pd.DataFrame, column: str) -> pd.DataFrame:
    rows, columns = table["learned_on"].unique(), table["tested_on"].unique()
    wide = table.pivot(index="learned_on", columns="tested_on", values=column)
    return wide.reindex(index=rows, columns=columns)


def _texts(table: pd.DataFrame) -> np.ndarray:
    """The change in points, and its interval below where there is one."""
    texts = table["change"].map(_points)
    if {"low", "high"} <= set(table):
        interval = "<br>(" + table["low"].map(_points) + " … " + table["high"].map(_points) + ")"
        texts = texts + interval.where(table[["low", "high"]].notna().all(axis=1), "")
    return _grid(table.assign(text=texts), "text").fillna("").to_numpy()


def _points(share: float) -> str:
    points = round(100 * share, 1)
    return "" if np.isnan(points) else f"{points:+.1f}".replace("-", "−") if points else "0.0"
