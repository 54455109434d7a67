"""Do gates that are trained under one mean for all positions reach what the paper's bias does?"""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.harm import harm_by_cell, summary
from eigenlens.paper.studies.views import INTERVALS, own, variant_dots

QUESTION = "Does an edit with one mean for all positions reach what means by position do?"
MINUTES = 45

__all__ = ["MINUTES", "QUESTION", "figure", "run", "summary", "text"]

run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What was found, and what the lines are."""
    cells, harm = own(table), harm_by_cell(table)
    found = [
        f"on {row['label']}, `{row['method']}` has {row['right']:.0f} of {row['n']:.0f} right with "
        f"{row['components']:,.0f} components, at {harm[row['cell']]:.2f} nats per token of other "
        "text"
        for row in cells[cells["method"] != "before"].to_dict("records")
    ]
    return (
        f"One split of each: {'; '.join(found)}. {INTERVALS} `By position` is the paper's "
        "token-index-dependent bias; with `one mean`, a coordinate has the same mean at every "
        "position, for training gates and for freezing, and the edit fits into the weights. "
        "`Attenuated` leaves gates between open and shut. Nothing is protected; gates are trained "
        "for 120 steps. Harm is the rise of the loss on WikiText-2 in nats per token (sixteen "
        "words given thirty-two)."
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per variant."""
    return variant_dots(table, left=200)
