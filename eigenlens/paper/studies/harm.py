"""What does an edit cost elsewhere, and what does each method reach that may cost little?"""

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.views import EACH, INTERVALS, own, percent, pooled, variant_dots

QUESTION = "What does each method reach that may cost other text no more than a bound?"
MINUTES = 90
_BOUNDED = ", within"  # in the names of methods that are held to a bound

run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What was found, and what the lines are."""
    return (
        f"{_held(table)} {_one_mean(table)} {INTERVALS} `Within` so many nats per token: of the "
        "model's own text, one half steers a search, and on the other the edit must stay that "
        "close to the unedited model. `Frozen` is what runs do by default: 120 steps, a price of "
        "6 nats of training loss per nat that freezing a component is predicted to cost that "
        "text, and the constants that it minds least. LoRA (rank 8) and IA3 have its divergence "
        "in their loss, with weight 10, and would be scaled back; each has one learning rate. "
        "`Means by position` is the paper's token-index-dependent bias; with `one mean`, a "
        "coordinate has the same mean at every position, for training gates and for freezing. "
        "Harm is the rise of the loss on WikiText-2 in nats per token (sixteen words given "
        "thirty-two), by seed; searches never saw that text."
    )


def _held(table: pd.DataFrame) -> str:
    """What methods reach under the bound, the best first, and at what harm."""
    cells = own(table)
    cells = cells.assign(harm=cells["cell"].map(harm_by_cell(table)))
    told = []
    for label, part in cells[cells["method"].str.contains(_BOUNDED)].groupby("label", sort=False):
        harm = part.groupby("method")["harm"]
        found = pooled(part).sort_values("accuracy", ascending=False)
        each = [
            f"{row['method'].split(_BOUNDED)[0]} {row['accuracy']:.0%} at "
            f"{harm.mean()[row['method']]:.3f} (at most {harm.max()[row['method']]:.3f})"
            for row in found.to_dict("records")
        ]
        told.append(f"{label}: {'; '.join(each)}")
    if not told:
        return ""
    return (
        "Held to a bound, methods reach on test, and cost WikiText-2 in nats per token (mean of "
        f"the splits, and the largest): {'. '.join(told)}."
    )


def _one_mean(table: pd.DataFrame) -> str:
    """One mean against means by position, by task."""
    found = pooled(own(table))
    by = {(r["label"], r["method"]): r["accuracy"] for r in found.to_dict("records")}
    told = [
        f"{label}, {method.replace(', one mean', '')}, {by[label, method]:.0%} ({value:.0%})"
        for (label, other), value in by.items()
        if (method := other.replace("means by position", "one mean")) != other
        if (label, method) in by
    ]
    return f"Under one mean (by position): {'; '.join(told)}." if told else ""


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
