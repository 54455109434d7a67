"""Do gates that are trained under one mean for all positions reach what the paper's bias does?"""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.harm import summary
from eigenlens.paper.studies.views import INTERVALS, variant_dots

QUESTION = "Does an edit with one mean for all positions reach what means by position do?"
MINUTES = 90

__all__ = ["MINUTES", "QUESTION", "figure", "run", "summary", "text"]

run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the lines are."""
    return (
        f"{INTERVALS} `By position` is the paper's token-index-dependent bias; with `one mean`, a "
        "coordinate has the same mean at every position, for training gates and for freezing, and "
        "the edit fits into the weights. `Attenuated` leaves gates between open and shut. Nothing "
        "is protected. Gates are trained for 120 steps on sums and for 80 on CB. Harm is the rise "
        "of the loss on WikiText-2 in nats per token (sixteen words given thirty-two)."
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per variant."""
    return variant_dots(table, left=200)
