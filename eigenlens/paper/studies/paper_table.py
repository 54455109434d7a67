"""The paper's table: each task before and after, with controls."""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import (
    EACH,
    INTERVALS,
    changes,
    dots,
    gained_and_lost,
    own,
    passes,
    percent,
    pooled,
    reached,
)

QUESTION = "What does eigenpruning do to the paper's tasks, beside random freezing, LASER and LoRA?"
MINUTES = 60


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the columns are."""
    return (
        f"{reached(table)} {INTERVALS} "
        "`exact` is the paper's measure: the answer is what greedy decoding over the whole "
        "vocabulary would write. `choice` asks only which candidate answer is the most likely, "
        "and `majority` is the exact accuracy of always giving the most frequent answer of the "
        "train split. `gained, lost` are test prompts against `before`, with McNemar's exact p "
        "(of a random control, the first draw; a prompt of several seeds counts once). `passes` "
        "are examples that the fit ran forward / backward, those that it chose on included."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Exact and choice accuracy of every method on every task."""
    found = pooled(own(table)).merge(changes(table), on=["model", "label", "method"])
    return pd.DataFrame(
        {
            "model": found["model"],
            "task": found["label"],
            "method": found["method"],
            "exact": found.apply(percent, axis=1),
            EACH: found["each"],
            "choice": found.apply(percent, axis=1, args=("choice", "choice_low", "choice_high")),
            "majority": found["majority"].map("{:.1%}".format),
            "gained, lost": gained_and_lost(found),
            "loss (nats)": found["loss"].map("{:.2f}".format),
            "share frozen": found["share"],
            "passes": passes(found),
        }
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per method."""
    found = pooled(own(table))
    labels, methods = list(dict.fromkeys(found["label"])), list(dict.fromkeys(found["method"]))
    return dots(found, labels, methods, height=430)
