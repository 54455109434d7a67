"""What does an edit consist of: groups of components, each frozen alone, and each left out?

Components are grouped by the training examples that freezing them acts on
(:func:`eigenlens.groups`); what a group does is measured on test examples.
"""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.circuits import groups
from eigenlens.exact import joint_effects
from eigenlens.paper.studies.config import StudyConfig
from eigenlens.paper.studies.grid import Bench, Cell, cells, grid_study
from eigenlens.paper.studies.parts import Parts
from eigenlens.paper.studies.views import slashed
from eigenlens.plots.style import BLUE, FULL_WIDTH, TEMPLATE, VERMILION

QUESTION = "What does an edit consist of, and does any part of it do the work alone?"
MINUTES = 45  # most of it for the edits themselves, which other studies need as well
COUNT = 12


def _measured(config: StudyConfig, folder: Path | None) -> pd.DataFrame:
    """The edits of the study, taken apart."""
    kept = Parts(folder)
    bench = Bench(kept, folder, config.share_scores)
    rows: list[dict[str, Any]] = []
    for cell in cells(config):
        names = {"model": cell.model, "label": cell.label, "seed": cell.seed}
        found = kept.do(f"{bench.file(cell)}_in_{COUNT}_groups", partial(_measure, bench, cell))
        rows += [{**names, **row} for row in found]
    return pd.DataFrame(rows)


run = grid_study(__name__, _measured)


def _measure(bench: Bench, cell: Cell) -> list[dict[str, Any]]:
    """A row per group; none where the search froze nothing."""
    frozen = bench.frozen(cell)
    if not len(frozen):
        return []
    loaded = bench.loaded(cell.model)
    task = loaded.task(cell.setting, cell.seed)
    options: dict[str, Any] = {"batch_size": cell.setting.batch_size, "progress": False}
    found = groups(loaded.model, loaded.spectra, frozen, task.train, count=COUNT, **options)
    whole = replace(frozen, spectra=loaded.spectra)
    own = [found.members["group"].to_numpy() == group for group in found.table["group"]]
    sets = [whole.part(np.flatnonzero(rows)) for rows in [*own, *(~rows for rows in own)]]
    effects = joint_effects(loaded.model, [*sets, whole], task.test, **options).mean(1)
    alone, rest, together = effects[: len(own)], effects[len(own) : -1], effects[-1]
    table = found.table[["group", "components", "where", "first_order", "reads", "writes"]]
    table = table.assign(alone=alone, missing=rest - together, together=together)
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def text(table: pd.DataFrame) -> str:
    """What was found, and what the columns are."""
    return (
        f"{' '.join(_found(table))} Components are grouped by the training examples that freezing "
        "them acts on, to first order (Ward's clusters of correlations); numbers are mean changes "
        "of the loss on test examples, in nats. `Alone`: only this group is frozen. `Left out`: "
        "all but this group is frozen, against the whole edit; above zero, the edit needs it. "
        "`First order` adds up what scores say of the members, on training examples. The table has "
        "the first split. `Reads` and "
        "`writes` name the tokens that the members with the largest effects have to do with most."
    )


def _found(table: pd.DataFrame) -> list[str]:
    told = []
    for label, part in table.groupby("label", sort=False):
        by_seed = part.groupby("seed")
        whole = by_seed["together"].first()
        shares = {
            "best": by_seed["alone"].min() / whole,
            "left": 1 + by_seed["missing"].max() / whole,
            "summed": by_seed["alone"].sum() / whole,
        }
        best, left, summed = (slashed(100 * share, ".0f") for share in shares.values())
        told.append(
            f"{label}: of what the whole edit changes the loss by ({slashed(whole, '+.2f')} nats, "
            f"by split), its best group alone does {best} %, {left} % are left without the group "
            f"that is missed most, and groups one at a time add up to {summed} %."
        )
    return told


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The groups of the first split of each task, the most missed first."""
    found = _first(table)
    return pd.DataFrame(
        {
            "task": found["label"],
            "components": found["components"],
            "where": found["where"],
            "alone": found["alone"].map("{:+.2f}".format),
            "left out": found["missing"].map("{:+.2f}".format),
            "first order": found["first_order"].map("{:+.2f}".format),
            "reads": found["reads"].map(_in_a_cell),
            "writes": found["writes"].map(_in_a_cell),
        }
    )


def _first(table: pd.DataFrame) -> pd.DataFrame:
    """The first split of every task, in the order of tasks, the most missed group first."""
    own = table[table["seed"] == table.groupby("label")["seed"].transform("min")]
    parts = [part for _, part in own.groupby("label", sort=False)]
    return pd.concat([part.sort_values("missing", ascending=False) for part in parts])


def _in_a_cell(tokens: str) -> str:
    """Tokens as text of one line in which Markdown sees no markup."""
    return re.sub(r"([\\`*_\[\]<>|$~])", r"\\\1", " ".join(tokens.split()))


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task: every group of the first split, alone and left out."""
    first = _first(table)
    labels = list(dict.fromkeys(first["label"]))
    drawn = make_subplots(rows=1, cols=len(labels), subplot_titles=labels, horizontal_spacing=0.1)
    for column, label in enumerate(labels, start=1):
        part = first[first["label"] == label].iloc[::-1]
        for values, name, colour in (
            (part["alone"], "frozen alone", BLUE),
            (part["missing"], "left out of the edit", VERMILION),
        ):
            drawn.add_scatter(
                x=values,
                y=np.arange(len(part)),
                mode="markers",
                marker={"color": colour, "size": 7},
                name=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        counts = part["components"].astype(str).tolist()
        drawn.update_yaxes(tickvals=np.arange(len(part)), ticktext=counts, row=1, col=column)
    drawn.update_xaxes(title_text="change of the loss (nats)", zeroline=True)
    drawn.update_yaxes(title_text="components of the group", col=1)
    drawn.update_yaxes(zeroline=False)
    drawn.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=430,
        margin={"t": 40, "b": 90},
        legend={"orientation": "h", "y": -0.2, "x": 0.5, "xanchor": "center"},
    )
    return drawn
