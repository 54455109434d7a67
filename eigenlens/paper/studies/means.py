"""Do gates that are trained under one mean for all positions reach what the paper's bias does?"""

from collections.abc import Iterator
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.harm import harm_by_cell, summary
from eigenlens.paper.studies.views import INTERVALS, own, variant_dots

QUESTION = "Does an edit with one mean for all positions reach what means by position do?"
MINUTES = 120

__all__ = ["MINUTES", "QUESTION", "figure", "run", "summary", "text"]

run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What was found, and what the lines are."""
    found = list(_pairs(table))
    less = [(old["harm"], new["harm"]) for _, new, old in found if old["harm"] > new["harm"]]
    factors = [old / new for old, new in less if new > 0]
    told = [
        f"{task}, {new['right']:.0f} of {new['n']:.0f} right at {new['harm']:.2f} nats per token "
        f"of other text ({old['right']:.0f} at {old['harm']:.2f})"
        for task, new, old in found
    ]
    factor = f", by a factor of {min(factors):,.0f} to {max(factors):,.0f}" if factors else ""
    return (
        f"One mean for all positions does less harm in {len(less)} of {len(found)} "
        f"comparisons{factor}. One split of each, and in brackets what means by position do: "
        f"{'; '.join(told)}. {INTERVALS} `By position` is the paper's "
        "token-index-dependent bias; with `one mean`, a coordinate has the same mean at every "
        "position, for training gates and for freezing, and the edit fits into the weights. "
        "`Attenuated` leaves gates between open and shut. Nothing is protected; gates are trained "
        "for 120 steps, 80 on CB. Harm is the rise of the loss on WikiText-2 in nats per token "
        "(sixteen words given thirty-two)."
    )


def _pairs(table: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """A task and how it was edited, with one mean and by position, where both were measured."""
    cells = own(table)
    cells = cells.assign(harm=cells["cell"].map(harm_by_cell(table))).set_index(["label", "method"])
    for label in cells.index.unique("label"):
        for how in ("frozen", "attenuated"):
            new, old = ((label, f"{means}, {how}") for means in ("one mean", "by position"))
            if new in cells.index and old in cells.index:
                yield f"{label}, {how}", dict(cells.loc[new]), dict(cells.loc[old])


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per variant."""
    return variant_dots(table, left=200)
