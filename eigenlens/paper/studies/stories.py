"""What does an edit consist of: groups of components, each frozen alone, and each left out?

Components are grouped by the training examples that freezing them acts on
(:func:`eigenlens.groups`); what a group does is measured on test examples.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from eigenlens.circuits import groups
from eigenlens.evaluation import evaluate
from eigenlens.exact import joint_effects
from eigenlens.paper.studies.config import CONFIGS, StudyConfig
from eigenlens.paper.studies.grid import Bench, Cell, cells
from eigenlens.paper.studies.parts import Parts
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.paper.studies.study import Study, shown
from eigenlens.plots.style import BLUE, FULL_WIDTH, TEMPLATE, VERMILION

QUESTION = "What does an edit consist of, and does any part of it do the work alone?"
MINUTES = 45  # most of it for the edits themselves, which other studies need as well
COUNT = 12


def run(
    models: tuple[str, ...] | None = None, config: Path | None = None, parts: Path | None = None
) -> ExperimentResult:
    """Make the edits of the study's YAML file, or of ``config``, and take them apart.

    Args:
        models: in place of the file's.
        config: YAML file in place of the study's own.
        parts: folder of this study's parts; edits lie beside it, where all studies find them.
    """
    read = StudyConfig.read(config or CONFIGS / "stories.yaml")
    read = read.of_models(models) if models else read
    folder = parts.parent / "cells" if parts is not None else None
    kept = Parts(folder)
    bench = Bench(kept, folder, read.share_scores)
    rows: list[dict[str, Any]] = []
    for cell in cells(read):
        names = {"model": cell.model, "label": cell.label, "seed": cell.seed}
        found = kept.do(f"{bench.file(cell)}_in_{COUNT}_groups", partial(_measure, bench, cell))
        rows += [{**names, **row} for row in found]
    settings = {"models": ", ".join(read.models), "seeds": ", ".join(map(str, read.seeds))}
    study: Study = sys.modules[__name__]
    return shown(study, "stories", pd.DataFrame(rows), settings)


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
    base = evaluate(loaded.model, task.test, choices=False, **options).loss
    table = found.table[["group", "components", "where", "first_order", "reads", "writes"]]
    table = table.assign(
        alone=alone, missing=rest - together, together=together, before=base, total=len(frozen)
    )
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def text(table: pd.DataFrame) -> str:
    """What was found, and what the columns are."""
    return (
        f"{' '.join(_found(table))} Components are grouped by the training examples that freezing "
        "them acts on, to first order (Ward's clusters of correlations); numbers are mean changes "
        "of the loss on test examples, in nats. `Alone`: only this group is frozen. `Left out`: "
        "all but this group is frozen, against the whole edit; above zero, the edit needs it. "
        "`First order` adds up what scores say of the members, on training examples. `Reads` and "
        "`writes` name the tokens that the members with the largest effects have to do with most."
    )


def _found(table: pd.DataFrame) -> list[str]:
    told = []
    for label, part in table.groupby("label", sort=False):
        by_seed = part.groupby("seed")
        best, all_of_it = by_seed["alone"].min(), by_seed["together"].first()
        summed, needed = by_seed["alone"].sum(), by_seed["missing"].max()
        told.append(
            f"{label}: the whole edit changes the loss by {_each(all_of_it)} nats, its best group "
            f"alone by {_each(best)}, all groups one at a time add up to {_each(summed)}, and "
            f"leaving out the one that is missed most costs {_each(needed)} (by split)."
        )
    return told


def _each(values: pd.Series) -> str:
    return " / ".join(f"{value:+.2f}" for value in values)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """The groups of every edit, the most missed first."""
    found = table.sort_values("missing", ascending=False, kind="stable")
    found = found.sort_values(["label", "seed"], kind="stable", key=_in_order)
    return pd.DataFrame(
        {
            "task": found["label"],
            "seed": found["seed"],
            "components": found["components"],
            "where": found["where"],
            "alone": found["alone"].map("{:+.2f}".format),
            "left out": found["missing"].map("{:+.2f}".format),
            "first order": found["first_order"].map("{:+.2f}".format),
            "reads": found["reads"],
            "writes": found["writes"],
        }
    )


def _in_order(values: pd.Series) -> pd.Series:
    """Numbers in the order of first appearance."""
    return pd.Series(pd.factorize(values)[0], values.index)


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task: every group of the first split, alone and left out."""
    labels = list(dict.fromkeys(table["label"]))
    drawn = make_subplots(rows=1, cols=len(labels), subplot_titles=labels, horizontal_spacing=0.24)
    for column, label in enumerate(labels, start=1):
        part = table[table["label"] == label]
        part = part[part["seed"] == part["seed"].min()].sort_values("missing", kind="stable")
        names = [
            f"{row.components} in {str(row.where).split(' ')[0]} …" for row in part.itertuples()
        ]
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
        drawn.update_yaxes(
            tickvals=np.arange(len(part)), ticktext=names, row=1, col=column, title_text=""
        )
    drawn.update_xaxes(title_text="change of the loss (nats)", zeroline=True)
    drawn.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=430,
        margin={"l": 120, "t": 40, "b": 90},
        legend={"orientation": "h", "y": -0.2, "x": 0.5, "xanchor": "center"},
    )
    return drawn
