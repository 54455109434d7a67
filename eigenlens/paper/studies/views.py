"""Tables and figures of studies that :mod:`eigenlens.paper.studies.grid` runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.paper.studies.repetitions import accuracy, prompts_of
from eigenlens.paper.studies.result import share
from eigenlens.plots.style import (
    BLUE,
    FULL_WIDTH,
    GREY,
    ORANGE,
    TEMPLATE,
    one_legend_entry_each,
    plain,
)
from eigenlens.statistics import balance, mcnemar

EACH = "each seed (%)"
_CELL = ["model", "label", "method"]
INTERVALS = (
    "Accuracies are of test examples that nothing else saw, and brackets hold 95 % intervals. Of "
    "one split and one fit that is Wilson's, for further examples. Of several seeds (each is "
    "another split), or of several random draws, it is for the mean over further ones: it grows "
    "with the spread between them, three say little, and prompts that they share count once. "
    "`each seed` has the accuracy of every seed, of several draws the lowest to the highest. "
    "Everything was chosen on validation data, by exact match, then loss, then the fewest "
    "components."
)


def own(table: pd.DataFrame) -> pd.DataFrame:
    """Measurements on the test splits of the cells' own tasks."""
    return table[table["data"] == ""]


def pooled(table: pd.DataFrame, by: Sequence[str] = _CELL) -> pd.DataFrame:
    """One row per model, task and method, over seeds and draws.

    Columns besides ``by``: ``accuracy, low, high`` (exact match), ``choice, choice_low,
    choice_high`` (empty without candidates), ``loss``, ``seeds``, ``draws``, the means of what a
    fit cost, and ``each`` (accuracies), ``components`` and ``share`` by seed as text.
    """
    rows = []
    for key, part in table.groupby(list(by), sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        found = accuracy(part)
        row |= dict(zip(_EXACT, (found.mean, *found.interval), strict=True))
        row["each"] = found.each
        row |= dict.fromkeys(_CHOICE, np.nan)
        if part["choice_right"].notna().all():
            chosen = accuracy(part, "choice_right")
            row |= dict(zip(_CHOICE, (chosen.mean, *chosen.interval), strict=True))
        row |= {"loss": part["loss"].mean(), "seeds": part["seed"].nunique()}
        row |= {"draws": part["draw"].nunique(), "n": int(_first_draw(part)["n"].sum())}
        for column in _COSTS:
            if column in part:
                row[column] = part[column].astype(float).mean()
        for column in ("components", "share"):
            if column in part:
                row[column] = _by_seed(_first_draw(part)[column], column)
        rows.append(row)
    return pd.DataFrame(rows)


_EXACT = ("accuracy", "low", "high")
_CHOICE = ("choice", "choice_low", "choice_high")
_COSTS = (
    "seconds",
    "forward_examples",
    "backward_examples",
    "peak_memory_mb",
    "parameters_changed",
    "saved_bytes",
    "majority",
    "candidates",
)


def _first_draw(part: pd.DataFrame) -> pd.DataFrame:
    return part[part["draw"] == part["draw"].min()]


def _by_seed(values: pd.Series, column: str) -> str:
    if values.isna().any():
        return ""
    return slashed(values, ",.0f" if column == "components" else ".2%")


def slashed(values: pd.Series, form: str) -> str:
    """Numbers of several splits, in one cell or sentence."""
    return " / ".join(format(value, form) for value in values)


def reached(table: pd.DataFrame, most: int = 6) -> str:
    """What the best methods reach on each task, and the unedited model."""
    found, told = pooled(own(table)), ["The best on test, and the unedited model."]
    several = found.groupby("label")["model"].transform("nunique") > 1
    found = found.assign(
        where=found["label"].where(~several, found["model"] + ", " + found["label"])
    )
    for where, part in found.groupby("where", sort=False):
        edited = part[part["method"] != "before"]
        best = edited.sort_values("accuracy", ascending=False, kind="stable").head(most)
        shown = pd.concat([best, part[part["method"] == "before"]])
        each = [f"{row['method']} {row['accuracy']:.0%}" for row in shown.to_dict("records")]
        told.append(f"{where}: {'; '.join(each)}.")
    return " ".join(told)


def variants(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and size of every variant, for a page."""
    found = pooled(own(table))
    return pd.DataFrame(
        {
            "task": found["label"],
            "variant": found["method"],
            "test accuracy": found.apply(percent, axis=1),
            EACH: found["each"],
            "loss (nats)": found["loss"].map("{:.2f}".format),
            "components": found["components"],
        }
    )


def variant_dots(table: pd.DataFrame, left: int = 220) -> go.Figure:
    """A panel per task, a line per variant, in the order of the table."""
    found = pooled(own(table))
    panels, rows = (list(dict.fromkeys(found[column])) for column in ("label", "method"))
    return dots(found, panels, rows, left=left)


def changes(table: pd.DataFrame, base: str = "before") -> pd.DataFrame:
    """Prompts gained and lost against ``base``, and McNemar's exact p, per cell of the table.

    A prompt that several seeds test on counts once, by the balance of its gains and losses.
    """
    rows = []
    for (model, label), part in own(table).groupby(["model", "label"], sort=False):
        was = part[part["method"] == base].set_index("seed")["correct"]
        for method, mine in part[part["draw"] == 0].groupby("method", sort=False):
            change: dict[str, int] = {}
            for _, row in mine.iterrows():
                pairs = zip(prompts_of(row), was[row["seed"]], row["correct"], strict=True)
                for prompt, before, now in pairs:
                    change[prompt] = change.get(prompt, 0) + int(now) - int(before)
            gained, lost = balance(change)
            names = {"model": model, "label": label, "method": method}
            rows.append({**names, "gained": gained, "lost": lost, "p": mcnemar(gained, lost)})
    return pd.DataFrame(rows)


def gained_and_lost(found: pd.DataFrame, base: str = "before") -> list[str]:
    """What :func:`changes` found, as cells of a page; empty for the base itself."""
    return [
        "" if row["method"] == base else f"{row['gained']}, {row['lost']} (p = {row['p']:.2g})"
        for row in found.to_dict("records")
    ]


def percent(row: pd.Series, name: str = "accuracy", low: str = "low", high: str = "high") -> str:
    """An accuracy with its interval, or nothing where there is none."""
    return "" if pd.isna(row[name]) else share(row[name], row[low], row[high])


def passes(found: pd.DataFrame) -> list[str]:
    """Examples that a fit ran forward and backward, mean over its repetitions."""
    return [
        f"{forward:,.0f} / {backward:,.0f}"
        for forward, backward in zip(
            found["forward_examples"], found["backward_examples"], strict=True
        )
    ]


def dots(
    found: pd.DataFrame,
    panels: Sequence[str],
    rows: Sequence[str],
    *,
    row: str = "method",
    panel: str = "label",
    height: int | None = None,
    left: int = 220,
) -> go.Figure:
    """Accuracies with intervals: a panel per task, a line per method; choices beside exact match.

    Args:
        found: of :func:`pooled`.
        panels, rows: values of the columns ``panel`` and ``row``, in order.
        row, panel: columns.
        height: in pixels; by the number of lines if not given.
        left: margin for the names of the lines, in pixels.
    """
    figure = make_subplots(
        rows=1,
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.05,
        subplot_titles=[_wrapped(name) for name in panels],
    )
    order = {name: i for i, name in enumerate(rows)}
    for column, name in enumerate(panels, start=1):
        part = found[(found[panel] == name) & found[row].isin(rows)]
        part = part.assign(at=part[row].map(order))
        for measure, low, high, colour, symbol, shift in _MEASURES:
            there = part[part[measure].notna()]
            if not len(there):
                continue
            figure.add_trace(
                go.Scatter(
                    x=there[measure],
                    y=there["at"] + shift * found["choice"].notna().any(),
                    error_x={
                        "type": "data",
                        "array": there[high] - there[measure],
                        "arrayminus": there[measure] - there[low],
                        "thickness": 1.2,
                        "width": 2,
                    },
                    mode="markers",
                    marker={"color": colour, "symbol": symbol, "size": 7},
                    name=_LABELS[measure],
                    legendgroup=measure,
                ),
                row=1,
                col=column,
            )
        base = part[part[row] == "before"]["accuracy"]
        for value in base:  # after the points: plotly draws no line in an empty panel
            figure.add_vline(value, line={"color": GREY, "dash": "dot"}, row=1, col=column)
    figure.update_xaxes(
        range=[-0.03, 1.03], tickvals=[0, 0.5, 1], ticktext=["0", "50", "100"], tickangle=0
    )
    figure.update_xaxes(title_text="test accuracy (%)" if len(panels) < 5 else "accuracy<br>(%)")
    figure.update_yaxes(
        tickvals=list(range(len(rows))),
        ticktext=[plain(name) for name in rows],
        range=[len(rows) - 0.4, -0.6],
        zeroline=False,
    )
    figure.update_yaxes(title_text=row, col=1)
    one_legend_entry_each(figure)
    legend = bool(found["choice"].notna().any())
    above, below = 70, 130 if legend else 60
    height = height or above + below + 20 + 24 * len(rows)
    figure.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=height,
        # 85 pixels below the axis, as a share of the plot
        legend={
            "orientation": "h",
            "y": -85 / (height - above - below),
            "yanchor": "top",
            "x": 0.5,
            "xanchor": "center",
        },
        margin={"t": above, "b": below, "l": left, "r": 20},
        showlegend=legend,
    )
    return figure


_MEASURES = (
    ("accuracy", "low", "high", BLUE, "circle", -0.15),
    ("choice", "choice_low", "choice_high", ORANGE, "diamond", 0.15),
)
_LABELS = {"accuracy": "exact match", "choice": "choice among candidates"}


def _wrapped(name: str) -> str:
    return plain(name).replace(", ", "<br>").replace(" as ", "<br>as ")
