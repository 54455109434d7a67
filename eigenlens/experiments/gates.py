"""How should a gate be trained: by which relaxation, from which start, with how much noise?"""

import sys
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from eigenlens.experiments.grid import grid_result
from eigenlens.experiments.result import ExperimentResult
from eigenlens.experiments.views import INTERVALS, dots, own, percent, pooled

QUESTION = "Which way to train gates finds the best set?"
MINUTES = 6


def run(
    models: tuple[str, ...] | None = None,
    config: Path | None = None,
    parts: Path | None = None,
) -> ExperimentResult:
    """Run ``configs/gates.yaml``, or ``config``."""
    return grid_result(sys.modules[__name__], "gates", models, config, parts)


def text(table: pd.DataFrame) -> str:
    """What the lines are."""
    return (
        f"{INTERVALS} Every line is `learned` with gates that end open or shut, with the same "
        "number of steps, and of one minibatch each. `sharpened` makes a sigmoid ever steeper, "
        "`penalised` charges gates in the middle, `hard concrete` draws gates at random. The "
        "price of an open gate is the same unless the line says otherwise. `started by scores` "
        "lets the gates of low `fisher` scores begin more open than others."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and size of every variant."""
    found = pooled(own(table))
    return pd.DataFrame(
        {
            "task": found["label"],
            "variant": found["method"],
            "test accuracy": found.apply(percent, axis=1),
            "loss (nats)": found["loss"].map("{:.2f}".format),
            "components": found["components"],
        }
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per variant."""
    found = pooled(own(table))
    return dots(
        found,
        list(dict.fromkeys(found["label"])),
        list(dict.fromkeys(found["method"])),
        left=290,
    )
