"""Which constant takes a component's place: the task's mean, or the one that text minds least?"""

import pandas as pd

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.harm import figure, harm_by_cell, summary
from eigenlens.paper.studies.views import INTERVALS, own

QUESTION = "Which constant should take a component's place: the task's mean, or text's own?"
MINUTES = 12

__all__ = ["MINUTES", "QUESTION", "figure", "run", "summary", "text"]

run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the lines are."""
    cells, harm = own(table), harm_by_cell(table)
    found = {
        row["method"]: f"{harm[row['cell']]:.3f} nats per token and has {row['right']:.0f} of "
        f"{row['n']:.0f} right"
        for row in cells.to_dict("records")
        if row["method"] != "before"
    }
    costs = "; ".join(f"`{method}` costs WikiText-2 {what}" for method, what in found.items())
    return (
        f"At one price, {costs}: the harm differs, the accuracy of so few examples does not. "
        f"{INTERVALS} Gates are learned under one constant for all positions and a price of 6 nats "
        "per predicted nat per token. `Mean of the task` freezes at the mean of the training "
        "prompts; `least harm` at the constant that is predicted to cost the model's own text "
        "least, a regression from the pass that gives the prices. Harm is the rise of the loss on "
        "WikiText-2 in nats per token, by seed; searches never saw that text."
    )
