"""Does a mask made for one task serve or harm others?"""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.paper.plots.transfer_grid import transfer as transfer_figure
from eigenlens.paper.studies.grid import grid_study
from eigenlens.paper.studies.repetitions import accuracy
from eigenlens.plots.style import FULL_WIDTH, TEMPLATE, plain

QUESTION = "Does a mask made for one task serve or harm others?"
MINUTES = 20
_BEFORE = "(no edit)"


run = grid_study(__name__)


def text(table: pd.DataFrame) -> str:
    """What rows and columns are."""
    return (
        "Rows: what the mask was made for (by the default search, components frozen). Columns: "
        "what it is tested on, exact match on test examples with 95 % intervals (of several "
        "seeds, for the mean over further ones); for text, the perplexity per token of WikiText-2 "
        "(sixteen words given thirty-two). The first row of each model is the model as it is."
    )


def _grid(table: pd.DataFrame) -> pd.DataFrame:
    """One row per mask and data: accuracy and perplexity over seeds."""
    probed = table[table["data"] != ""]
    rows = []
    for (model, label, method, data), part in probed.groupby(
        ["model", "label", "method", "data"], sort=False
    ):
        mask = _BEFORE if method == "before" else label
        rows.append(
            {
                "model": model,
                "mask": mask,
                "data": data,
                "accuracy": accuracy(part),
                "perplexity": part["perplexity"].astype(float).mean(),
                "is_text": (part["task"] == "wikitext").all(),
            }
        )
    # The unedited model is measured beside each mask, and is the same every time.
    return pd.DataFrame(rows).drop_duplicates(["model", "mask", "data"])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per mask, a column per data set."""
    found = _grid(table)
    found["cell"] = [
        f"{perplexity:.1f}" if is_text else str(reached)
        for reached, perplexity, is_text in zip(
            found["accuracy"], found["perplexity"], found["is_text"], strict=True
        )
    ]
    order = found[["model", "mask"]].drop_duplicates()
    order = order.assign(last=order["mask"] != _BEFORE).sort_values(
        ["model", "last"], kind="stable"
    )
    wide = found.pivot(index=["model", "mask"], columns="data", values="cell")
    wide = wide[list(dict.fromkeys(found["data"]))]
    return wide.loc[list(zip(order["model"], order["mask"], strict=True))].reset_index().fillna("")


def figure(table: pd.DataFrame) -> go.Figure:
    """A heat map per model: change of accuracy against the unedited model."""
    found = _grid(table)
    tasks = found[~found["is_text"]]
    models = list(dict.fromkeys(tasks["model"]))
    titles = [plain(model) for model in models]
    drawn = make_subplots(rows=1, cols=len(models), subplot_titles=titles, horizontal_spacing=0.2)
    for column, model in enumerate(models, start=1):
        part = transfer_figure(_changes(tasks[tasks["model"] == model])).data[0]
        part.update(zmin=-100, zmax=100, showscale=column == len(models))
        drawn.add_trace(part, row=1, col=column)
    drawn.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    drawn.update_yaxes(title_text="mask made for", col=1)
    drawn.update_xaxes(title_text="tested on", showgrid=False, tickangle=-90)
    drawn.update_layout(template=TEMPLATE, width=FULL_WIDTH, height=500, margin={"b": 150})
    return drawn


def _changes(tasks: pd.DataFrame) -> pd.DataFrame:
    """Accuracy under each mask less that of the unedited model, on each data set."""
    tasks = tasks.assign(accuracy=[found.mean for found in tasks["accuracy"]])
    before = tasks[tasks["mask"] == _BEFORE].set_index("data")["accuracy"]
    masks = tasks[tasks["mask"] != _BEFORE]
    return pd.DataFrame(
        {
            "learned_on": masks["mask"],
            "tested_on": masks["data"],
            "change": masks["accuracy"] - masks["data"].map(before),
        }
    )
