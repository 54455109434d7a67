"""What does an edit cost elsewhere, and does one mean for all positions do as well as many?"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import EACH, INTERVALS, own, percent, pooled, variant_dots

QUESTION = "What does an edit cost elsewhere, and which means keep that low?"
MINUTES = 25


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What the lines are."""
    return (
        "One mean for all positions does as well as the paper's means by position where gates are "
        "learned, better where one ranking decides, and costs other text far less; a price per "
        "gate lowers that cost further, and some accuracy with it. LoRA that is trained under a "
        "penalty costs other text least, at an accuracy that so few examples do not tell from that "
        "of priced gates. "
        f"{INTERVALS} `Means by position` is the paper's token-index-dependent bias; with `one "
        "mean`, a coordinate has the same mean at every position, for training gates and for "
        "freezing. A price of λ adds to every gate λ nats of training loss per nat per token that "
        "freezing its component is predicted to cost text that the model wrote itself; with `least "
        "harm`, components are frozen at the constants that this text minds least. `LoRA, within "
        "0.03` (rank 8, one learning rate) has the divergence of that text in its loss, with "
        "weight 10, and is scaled back until it is within 0.03 nats per token. Harm is the "
        "rise of the loss on WikiText-2 in nats per token (sixteen words given thirty-two), by "
        "seed; searches never saw that text. `learned` "
        "runs for 120 steps."
    )


def harm_by_cell(table: pd.DataFrame) -> pd.Series:
    """Rise of the loss on text against the unedited model, by cell."""
    if "perplexity" not in table:
        return pd.Series(dtype=float)
    probed = table[table["perplexity"].notna()]
    base = probed[probed["method"] == "before"].set_index(["model", "seed"])["perplexity"]
    base = base[~base.index.duplicated()]  # the same text, once for each task
    keys = pd.MultiIndex.from_frame(probed[["model", "seed"]])
    rise = np.log(probed["perplexity"].astype(float).to_numpy() / base.loc[keys].to_numpy(float))
    return pd.Series(rise, index=probed["cell"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, size and harm of every variant."""
    cells, found = own(table), pooled(own(table))
    harm = harm_by_cell(table)
    key = ["label", "method"]
    by_seed = (
        cells.assign(
            harm=[f"{harm[cell]:.3f}" if cell in harm else "" for cell in cells["cell"]],
        )
        .groupby(key, sort=False)["harm"]
        .agg(" / ".join)
    )
    rows = by_seed.loc[pd.MultiIndex.from_frame(found[key])]
    return pd.DataFrame(
        {
            "task": found["label"],
            "edit": found["method"],
            "test accuracy": found.apply(percent, axis=1),
            EACH: found["each"],
            "components": found["components"],
            "share": found["share"],
            "harm (nats per token)": [value.strip(" /") for value in rows],
        }
    )


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per variant."""
    return variant_dots(table, left=260)
