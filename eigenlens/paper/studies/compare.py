"""Eigenpruning against every baseline, in one harness: accuracy, time, memory, parameters."""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import (
    EACH,
    INTERVALS,
    dots,
    own,
    passes,
    percent,
    pooled,
    reached,
)

QUESTION = "How does eigenpruning compare with other ways to change a model, and at what cost?"
MINUTES = 150


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the columns are."""
    return (
        f"{reached(table)} {INTERVALS} "
        "Each method has the same examples to learn from and the same ones to choose on. `tried` "
        "counts the candidates that it measured on validation (a search by gates looks at "
        "validation itself and hands over one). `passes` are examples run forward / backward. "
        "Passes, seconds and memory are of the whole fit, decomposition excepted, in one process "
        "on one core that other work shared: passes are exact, seconds upper bounds. Memory is "
        "what the process took above its size before. `numbers set` counts what the edit sets: "
        "strengths of frozen components and their means (one, or one at each position), "
        "entries of adapters, singular values cut."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and cost of every method on every task."""
    found = pooled(own(table))
    return pd.DataFrame(
        {
            "task": found["label"],
            "method": found["method"],
            "test accuracy": found.apply(percent, axis=1),
            EACH: found["each"],
            "loss (nats)": found["loss"].map("{:.2f}".format),
            "components": found["components"],
            "tried": found["candidates"].map("{:.0f}".format),
            "seconds": found["seconds"].map("{:.1f}".format),
            "passes": passes(found),
            "memory (MB)": found["peak_memory_mb"].map("{:,.0f}".format),
            "numbers set": found["parameters_changed"].map("{:,.0f}".format),
            "file (kB)": (found["saved_bytes"] / 1000).map("{:,.0f}".format),
        }
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per method."""
    found = pooled(own(table))
    return dots(found, list(dict.fromkeys(found["label"])), list(dict.fromkeys(found["method"])))
