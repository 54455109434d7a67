"""Which part of eigenpruning does the work: matrices, reference, bias, basis?"""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import INTERVALS, variant_dots, variants

QUESTION = "Which part of eigenpruning does the work?"
MINUTES = 30


run = grid_study(__name__)


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
    return variants(table)


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per variant."""
    return variant_dots(table)
