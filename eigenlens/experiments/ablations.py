"""Which part of eigenpruning does the work: matrices, reference, bias, basis?"""

import sys
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from eigenlens.experiments.grid import grid_result
from eigenlens.experiments.result import ExperimentResult
from eigenlens.experiments.views import INTERVALS, dots, own, percent, pooled

QUESTION = "Which part of eigenpruning does the work?"
MINUTES = 30


def run(
    models: tuple[str, ...] | None = None,
    config: Path | None = None,
    parts: Path | None = None,
) -> ExperimentResult:
    """Run ``configs/ablations.yaml``, or ``config``."""
    return grid_result(sys.modules[__name__], "ablations", models, config, parts)


def text(table: pd.DataFrame) -> str:
    """What the lines are."""
    return (
        f"{INTERVALS} `learned` is the default search. Below it, first what is done to the set "
        "that it found, without searching anew: `zero` takes the components away and adds nothing, "
        "`position-free` adds their mean over all positions everywhere, `bias only` adds the means "
        "and leaves the weights. Then searches over some kinds of matrices, or over the directions "
        "of a random orthogonal basis. `one-shot` lines change the reference value of the scores."
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
    return dots(found, list(dict.fromkeys(found["label"])), list(dict.fromkeys(found["method"])))
