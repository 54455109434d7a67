"""Which part of eigenpruning does the work: matrices, reference, bias, basis?"""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import INTERVALS, reached, variant_dots, variants

QUESTION = "Which part of eigenpruning does the work?"
MINUTES = 60


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the lines are."""
    return (
        f"{reached(table)} {INTERVALS} "
        "`learned` trains gates under one mean for all positions, and under `means by position` "
        "as in the paper; nothing is protected. `Its set` is what the search above it found, "
        "without searching anew: `zero` takes the components away and adds nothing, `bias only` "
        "adds their means and leaves the weights, `position-free` puts the mean over all "
        "positions in their place. Then searches over the directions of a random orthogonal "
        "basis, or over some kinds of matrices. `one-shot` lines change the reference value of "
        "the scores."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and size of every variant."""
    return variants(table)


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per variant."""
    return variant_dots(table)
