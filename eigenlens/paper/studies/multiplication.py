"""The paper's headline task, multiplication of integers, on another model than the paper's."""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import (
    EACH,
    INTERVALS,
    changes,
    gained_and_lost,
    own,
    passes,
    percent,
    pooled,
    reached,
    variant_dots,
)

QUESTION = "Does multiplication improve as the paper says, and as much as by adapters?"
MINUTES = 60

run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What was found, beside what the paper reports."""
    return (
        f"{reached(table)} The paper has 13.75 % and 97.50 % for Phi-2, of 80 "
        f"examples, by freezing in one shot. {INTERVALS} Prompts are `a x b = ` with both factors "
        "below 20: 400 products, of which 300 are learned from. `Learned` trains gates under one "
        "mean for all positions, and protects nothing. `Gained, lost` are test prompts against "
        "`before`, with McNemar's exact p (of the random control, its first draw)."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and size of every edit, and what it changes."""
    found = pooled(own(table)).merge(changes(table), on=["model", "label", "method"])
    return pd.DataFrame(
        {
            "task": found["label"],
            "edit": found["method"],
            "test accuracy": found.apply(percent, axis=1),
            EACH: found["each"],
            "gained, lost": gained_and_lost(found),
            "components": found["components"],
            "numbers set": found["parameters_changed"].map("{:,.0f}".format),
            "passes": passes(found),
        }
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per model, a line per method."""
    return variant_dots(table)
