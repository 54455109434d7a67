"""Does it work on other architectures? The same task and methods on several models."""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import (
    EACH,
    INTERVALS,
    changes,
    dots,
    own,
    passes,
    percent,
    pooled,
    reached,
)

QUESTION = "Does eigenpruning work on other architectures?"
MINUTES = 40


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the models are."""
    return (
        f"{reached(table)} {INTERVALS} "
        "arith-tiny is a GPT-2 of 2 layers with numbers as tokens; SmolLM2 a Llama with "
        "grouped-query attention and two digits per number; Gemma-3 has one key and value head, "
        "norms before and after each block, gated GELU and a vocabulary of 262,144. `passes` are "
        "examples that the fit ran forward / backward."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of every method on every model."""
    found = pooled(own(table)).merge(changes(table), on=["model", "label", "method"])
    return pd.DataFrame(
        {
            "model": found["model"],
            "task": found["label"],
            "method": found["method"],
            "test accuracy": found.apply(percent, axis=1),
            EACH: found["each"],
            "p against before": [
                "" if m == "before" else f"{p:.2g}"
                for m, p in zip(found["method"], found["p"], strict=True)
            ],
            "loss (nats)": found["loss"].map("{:.2f}".format),
            "share frozen": found["share"],
            "passes": passes(found),
        }
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per model and task, a line per method."""
    found = pooled(own(table))
    found["panel"] = found["model"] + ", " + found["label"]
    panels = list(dict.fromkeys(found["panel"]))
    return dots(found, panels, list(dict.fromkeys(found["method"])), panel="panel", height=380)
