"""How should a gate be trained: by which relaxation, from which start, with how much noise?"""

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import INTERVALS, variant_dots, variants

QUESTION = "Which way to train gates finds the best set?"
MINUTES = 6


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the lines are."""
    return (
        f"{INTERVALS} Every line is `learned` with gates that end open or shut, with the same "
        "number of steps, and of one minibatch each. `sharpened` makes a sigmoid ever steeper, "
        "`penalised` charges gates in the middle, `hard concrete` draws gates at random. The "
        "price of an open gate is the same unless the line says otherwise. `started by scores` "
        "lets the gates of low `fisher` scores begin more open than others."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy and size of every variant."""
    return variants(table)


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per variant."""
    return variant_dots(table, left=290)
