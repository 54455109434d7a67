"""One look for every figure: colour-blind safe, legible at paper width.

Colours are the palette of Okabe and Ito (2008); sequences are viridis.
"""

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#8A8A8A",
)
# Pixels across a page (7 in) and a column (3.3 in) of a paper: 14 px type is 7.8 pt there.
FULL_WIDTH, COLUMN_WIDTH = 900, 424
# From below zero (harmful) to above (helpful), and from less to more; both colour-blind safe.
HARM_HELP = [[0.0, VERMILION], [0.5, "#F4F4F4"], [1.0, BLUE]]
LESS_MORE = [[0.0, "#5E3C99"], [0.5, "#F7F7F7"], [1.0, "#E66101"]]
SIGN = "ΔL < 0: freezing is predicted to lower the loss"

pio.templates["eigenlens"] = go.layout.Template(
    layout={
        "font": {"family": "Helvetica, Arial, sans-serif", "size": 14, "color": "#222222"},
        "colorway": [BLUE, VERMILION, GREEN, ORANGE, PINK, SKY, GREY],
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "xaxis": {"gridcolor": "#E6E6E6", "zerolinecolor": "#BBBBBB", "linecolor": "#888888"},
        "yaxis": {"gridcolor": "#E6E6E6", "zerolinecolor": "#888888", "linecolor": "#888888"},
        "colorscale": {"sequential": "Viridis"},
        "margin": {"l": 80, "r": 30, "t": 70, "b": 60},
    }
)
TEMPLATE = "plotly_white+eigenlens"


def plain(text: object) -> str:
    """Text from outside for a figure: plotly reads ``<b>``, ``<s>`` or ``&lt;`` as HTML."""
    return html.escape(str(text), quote=False)  # plotly knows no entity for quotes


def kind_label(kind: str) -> str:
    """A matrix as it is written in a text: W with a subscript; joint maps have two letters."""
    return f"W<sub>{kind[2:]}</sub>" if kind.startswith("W_") else kind


def visible(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows of points that an eye can tell apart in a panel, where there are over a thousand.

    One of each cell of a grid whose cells are smaller than a mark: the farthest from zero in y.
    What is not finite is drawn nowhere and left out.
    """
    rows = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    if len(rows) <= 1000:
        return rows
    rows = rows[np.argsort(-np.abs(y[rows]), kind="stable")]
    cells = np.stack([_bins(x[rows], 120), _bins(y[rows], 60)])
    return np.sort(rows[np.unique(cells, axis=1, return_index=True)[1]])


def _bins(values: np.ndarray, count: int) -> np.ndarray:
    low, width = values.min(), np.ptp(values) or 1.0
    return np.minimum(((values - low) / width * count).astype(int), count - 1)


def bends(y: np.ndarray, most: int) -> np.ndarray:
    """Places on a line, at most so many, evenly along its length in a panel; its ends are there."""
    if len(y) <= most:
        return np.arange(len(y))
    rise = np.abs(np.diff(y)) / (np.ptp(y) or 1.0)
    along = np.concatenate([[0.0], np.cumsum(rise + 1 / len(y))])
    return np.unique(np.searchsorted(along, np.linspace(0, along[-1], most)))


def one_legend_entry_each(figure: go.Figure) -> None:
    """Traces of the same name, one in each panel, share their first one's entry in the legend."""
    shown: set[str] = set()
    for trace in figure.data:
        trace.showlegend = trace.name not in shown
        shown.add(trace.name)


def heading(text: str, note: str, height: int) -> dict[str, Any]:
    """A title with a smaller line below it, at a fixed distance from the top of the figure."""
    place = {"x": 0.02, "y": 1 - 26 / height, "yanchor": "top"}
    return {"text": f"{text}<br><sup>{note}</sup>" if note else text, **place}


def signed_log(values: np.ndarray, unit: float) -> np.ndarray:
    """Linear within ±``unit``, logarithmic outside: for values of both signs over many decades."""
    return np.arcsinh(values / unit / 2) / np.log(10)


def signed_log_ticks(values: np.ndarray, unit: float) -> tuple[list[float], list[str]]:
    """Tick positions and labels for :func:`signed_log`: zero and every second power of ten."""
    largest = float(np.nan_to_num(np.abs(values)).max(initial=unit))
    lowest = int(np.log10(unit))
    powers = [p for p in range(lowest, 12) if 10.0**p <= largest * 1.5]
    # What lies within a quarter of the axis is too close to zero for two labels, unless there is
    # nothing else.
    near = lowest + (powers[-1] - lowest) / 4
    powers = [p for p in powers[-1::-2][::-1] if p > lowest and p >= near] or powers
    ticks = [-(10.0**p) for p in powers[::-1]] + [0.0] + [10.0**p for p in powers]
    return signed_log(np.array(ticks), unit).tolist(), [_power(tick) for tick in ticks]


def log_ticks(low: float, high: float, most: int = 8) -> tuple[list[float], list[str]]:
    """Tick positions and labels of a logarithmic axis from ``low`` to ``high``.

    At 1, 2 and 5 times powers of ten where no more than ``most`` lie within, else at powers; at the
    ends where fewer than two lie within.
    """
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    fine = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    if len(fine) < 2:
        return [low, high], [f"{low:.2g}", f"{high:.2g}"]
    if len(fine) <= most:
        return fine, [f"{tick:,g}" for tick in fine]
    step = -(-len(powers) // most)
    coarse = [10.0**p for p in powers if low <= 10.0**p <= high and p % step == 0]
    return coarse, [_power(tick) for tick in coarse]


def _power(value: float) -> str:
    if value == 0 or 0.01 <= abs(value) <= 100:
        return f"{value:g}".replace("-", "−")
    sign, exponent = "−" if value < 0 else "", round(np.log10(abs(value)))
    return f"{sign}10<sup>{exponent}</sup>".replace("-", "−")
