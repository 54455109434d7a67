"""Does it matter which coordinates of an activation are the components?

In every basis, the components are scored and searched alike: frozen in one shot at numbers that are
the same for all bases, and by trained gates at the same price of a coordinate. On tasks that the
model masters it is asked how few coordinates hold what it does when all others of the basis are
frozen (:mod:`eigenlens.paper.studies.sufficiency`).
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import scipy.stats
from plotly.subplots import make_subplots
from pydantic import BaseModel, ConfigDict, Field, model_validator

from eigenlens.decomposition import Basis, decompose, kinds_of
from eigenlens.evaluation import evaluate
from eigenlens.exact import exact_effects
from eigenlens.faithfulness import faithfulness_curve
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.metrics import kl_to_unedited
from eigenlens.paper.studies.by_split import Measurement, Split, study_by_split
from eigenlens.paper.studies.config import TasksConfig
from eigenlens.paper.studies.repetitions import accuracy, prompts_column
from eigenlens.paper.studies.sufficiency import (
    ENOUGH,
    LEARNED,
    enough,
    kept_by_gates,
    records,
)
from eigenlens.paper.studies.views import INTERVALS
from eigenlens.plots.style import (
    BLUE,
    FULL_WIDTH,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    TEMPLATE,
    VERMILION,
    one_legend_entry_each,
    plain,
)
from eigenlens.scoring import Scores, score
from eigenlens.search import LearnedConfig, learned
from eigenlens.selection import select

QUESTION = "Does it matter in which basis components are scored, frozen and kept?"
MINUTES = 10
ONE_SHOT, FROZEN, ATTENUATED = "one-shot", "learned, frozen", "learned, attenuated"
SCORES, HELD = "scores", "held"  # rows that are of no edit
RANKED = "size of mean"
_COLOURS = (BLUE, GREY, GREEN, ORANGE, VERMILION, SKY, PINK)


class Coordinates(BaseModel):
    """A basis, of all matrices that it has or of some kinds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    basis: Basis
    matrices: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> "Coordinates":
        kinds_of(self.basis, self.matrices)
        return self


class BasesConfig(TasksConfig):
    """What the study runs.

    Attributes:
        bases: by the labels that the page shows.
        held: labels of the tasks on which it is asked what holds them; on the others, what harms.
        counts: components that are frozen in one shot.
        kept: components that a ranking keeps, where there are more.
        steps: of the gates.
        price: of opening a gate, in nats per thousand of them.
        keeping: price of keeping a component, likewise.
        n_examples: training examples of scores that are compared with exact effects.
    """

    bases: dict[str, Coordinates] = Field(min_length=1)
    held: tuple[str, ...] = ()
    counts: tuple[int, ...] = (4, 16, 64)
    kept: tuple[int, ...] = (16, 32, 64, 96, 128, 192, 256, 384, 512, 640, 768, 1024, 1280)
    steps: int = Field(default=120, ge=1)
    price: float = Field(default=2.0, ge=0)
    keeping: float = Field(default=7.0, ge=0)
    n_examples: int = Field(default=40, ge=1)


def _measurements(split: Split, config: BasesConfig) -> Iterator[Measurement]:
    measure = _held if split.label in config.held else _edited
    options = config.model_dump(exclude={"models", "tasks", "seeds", "bases", "held"})
    options |= {"batch_size": split.setting.batch_size, "what": measure.__name__}
    for label, wanted in config.bases.items():
        yield Measurement(
            partial(measure, split, wanted, config),
            {**options, **wanted.model_dump()},
            (wanted.basis,),
            {"basis": label},
        )


run = study_by_split(__name__, BasesConfig, _measurements, {"steps": "steps"})


def _scored(split: Split, wanted: Coordinates, n_examples: int | None = None) -> Scores:
    """Scores of the basis on so many training examples, or all."""
    train = split.task.train
    spectra = decompose(
        split.loaded,
        wanted.matrices,
        basis=wanted.basis,
        data=train if wanted.basis == "pca" else None,
        seed=split.seed,
        progress=False,
    )
    data = train.select(range(min(n_examples or len(train), len(train))))
    return score(
        split.loaded,
        spectra,
        data,
        criterion="margin",
        reference="shared",
        batch_size=split.setting.batch_size,
        progress=False,
    )


def _edited(split: Split, wanted: Coordinates, config: BasesConfig) -> list[dict[str, Any]]:
    """What freezing reaches, and how true the scores are."""
    scores = _scored(split, wanted)
    reached = partial(_reached, split, len(scores))
    rows = [
        reached(ONE_SHOT, select(scores, count=count))
        for count in (0, *config.counts)
        if count <= len(scores)
    ]
    for method in (FROZEN, ATTENUATED):
        options = _gates(split, config, config.price * len(scores) / 1000)
        options = options.model_copy(update={"attenuate": method == ATTENUATED})
        data = split.task.train, split.task.validation
        rows.append(
            reached(method, learned(split.loaded, scores, *data, options, progress=False).frozen)
        )
    few = _scored(split, wanted, config.n_examples)
    data = split.task.train.select(range(min(config.n_examples, len(split.task.train))))
    exact = exact_effects(split.loaded, few, np.arange(len(few)), data, progress=False).mean(1)
    rho = float(scipy.stats.spearmanr(few.delta_loss, exact).statistic)
    return [*rows, {"method": SCORES, "candidates": len(few), "spearman": rho}]


def _gates(split: Split, config: BasesConfig, sparsity: float) -> LearnedConfig:
    return LearnedConfig(
        steps=config.steps,
        sparsity=sparsity,
        batch_size=split.setting.batch_size,
        seed=split.seed,
    )


def _reached(split: Split, candidates: int, method: str, frozen: FrozenSet) -> dict[str, Any]:
    with freeze(split.loaded, frozen):
        found = evaluate(split.loaded, split.task.test, choices=False, progress=False)
    return {
        "method": method,
        "components": len(frozen),
        "candidates": candidates,
        "right": int(found.examples["correct"].sum()),
        "n": found.n,
        "prompts": prompts_column(split.task.test),
    }


def _held(split: Split, wanted: Coordinates, config: BasesConfig) -> list[dict[str, Any]]:
    """How faithful the model is to itself on what a ranking keeps, and on what gates keep."""
    scores = _scored(split, wanted)
    curve = faithfulness_curve(
        split.loaded,
        scores,
        split.task.test,
        values=np.abs(scores.with_criterion("mean").delta_loss),
        kept=[count / len(scores) for count in config.kept if count < len(scores)],
        metric=kl_to_unedited(split.loaded, split.task.test),
        batch_size=split.setting.batch_size,
    )
    rows = [{"ranking": RANKED, **row} for row in records(curve)]
    options = _gates(split, config, config.keeping * len(scores) / 1000)
    rows += kept_by_gates(split.loaded, scores, split.task, options)
    return [{"method": HELD, "candidates": len(scores), **row} for row in rows]


def _cells(table: pd.DataFrame) -> pd.DataFrame:
    """One row per task, basis and edit, over seeds."""
    edits = table[table["right"].notna()]
    counted = edits["method"] + edits["components"].map(", {:.0f}".format)
    edits = edits.assign(edit=edits["method"].where(edits["method"] != ONE_SHOT, counted))
    rows = []
    for key, part in edits.groupby(["label", "basis", "edit"], sort=False):
        row: dict[str, Any] = dict(zip(("task", "basis", "edit"), key, strict=True))
        row |= {"method": part["method"].iloc[0], "components": part["components"].mean()}
        row["each"] = _each(part["components"], "{:.0f}")
        rows.append({**row, "accuracy": accuracy(part)})
    return pd.DataFrame(rows)


def _each(values: pd.Series, form: str) -> str:
    return " / ".join(form.format(value) for value in values)


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """Faithfulness over components kept, seeds averaged: several numbers of a ranking."""
    inner = table[(table["method"] == HELD) & table["kept"].between(0, 1, inclusive="neither")]
    by = inner["kept"].where(inner["ranking"] == RANKED, 0)
    inner = inner.assign(components=inner["kept"] * inner["candidates"], by=by)
    keys = ["label", "basis", "ranking", "by"]
    return inner.groupby(keys, sort=False)[["components", "faithfulness"]].mean().reset_index()


def _fewest(ranked: pd.DataFrame, candidates: int) -> float:
    """The smallest number measured that holds the task; all of them do."""
    whole = pd.DataFrame({"kept": [candidates], "faithfulness": [1.0]})
    curve = pd.concat([ranked.rename(columns={"components": "kept"}), whole], ignore_index=True)
    return enough(curve)


def text(table: pd.DataFrame) -> str:
    """What was found, and what the columns are."""
    return (
        f"{_finding(table)} What the singular basis buys is size: gates freeze and keep half as "
        "many components there as in a random one. The joint maps gain nothing over the "
        "singular bases of W_Q and W_O, which have the same activations. Four neurons, frozen "
        "in one shot, reach more over both tasks than four components of any other basis. "
        "Components are scored by `margin` and frozen at one mean for all positions. `one-shot, "
        "n` freezes the n lowest scores, whatever validation says; of none, it is the model as "
        "it is. Gates have equally many steps and the same price of a component, so that a "
        "basis of fewer components is not favoured. `svd`, `random` and `pca` are bases of the "
        "same activations, those of all matrices; `qk_ov` has queries and heads' outputs, as "
        "`svd, W_Q and W_O` has, and `neurons` the input of W_out. Numbers of components, and "
        "ρ, are by seed: ρ is Spearman's, of scores with exact effects of all components. A "
        "task is held where the model's answers on test are what they were, to a faithfulness "
        f"of {ENOUGH}, while the other components of the basis are frozen and matrices that it "
        "leaves out stay whole. `kept, ranked` is the smallest number measured that holds it, "
        "the largest mean effects kept first; `kept, learned` the set of trained gates, with "
        f"its faithfulness. {INTERVALS}"
    )


def _finding(table: pd.DataFrame) -> str:
    """Where the first basis stands in each respect, over tasks and seeds, and the others."""
    cells, points = _cells(table), _points(table)
    cells = cells.assign(mean=[found.mean for found in cells["accuracy"]])

    def of(edit: str, column: str = "mean") -> pd.Series:
        return cells[cells["edit"] == edit].groupby("basis", sort=False)[column].mean()

    counts = cells[cells["method"] == ONE_SHOT].groupby("edit", sort=False)["mean"].mean()
    most = str(counts.idxmax())
    rho = table.groupby("basis", sort=False)["spearman"].mean()
    sizes = [f"gates freeze {_listed(of(FROZEN, 'components'), '{:.0f}')}"]
    gates = points[points["ranking"] == LEARNED]
    if len(gates):
        kept = gates.groupby("basis", sort=False)["components"].mean()
        sizes.append(f"and keep {_listed(kept, '{:.0f}')}")
    return (
        f"Of {len(rho)} bases, {rho.index[0]} is number {_place(of(FROZEN))} by what gates that "
        f"freeze reach ({_listed(of(FROZEN), '{:.0%}')}), number {_place(of(most))} by {most} "
        f"({_listed(of(most), '{:.0%}')}), and number {_place(rho)} by how well scores agree with "
        f"exact effects ({_listed(rho, '{:.2f}')}). Of components, {' '.join(sizes)}."
    )


def _place(values: pd.Series) -> int:
    """Of the first basis."""
    return 1 + int((values > values.iloc[0]).sum())


def _listed(values: pd.Series, form: str) -> str:
    return "; ".join(f"{basis} {form.format(value)}" for basis, value in values.items())


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """What is reached in each basis, how true its scores are, and how many hold a task."""
    points, cells = _points(table), _cells(table)
    rows = []
    for (label, basis), part in table.groupby(["label", "basis"], sort=False):
        n = int(part["candidates"].iloc[0])
        own = cells[(cells["task"] == label) & (cells["basis"] == basis)].set_index("edit")
        row: dict[str, Any] = {"task": label, "basis": basis, "coordinates": f"{n:,}"}
        for edit in cells["edit"].unique():
            there = edit in own.index
            row[edit] = str(own.loc[edit, "accuracy"]) if there else ""
            if not edit.startswith(ONE_SHOT):
                row[f"components, {edit.split()[-1]}"] = own.loc[edit, "each"] if there else ""
        row["ρ"] = _each(part["spearman"].dropna(), "{:.2f}")
        held = points[(points["label"] == label) & (points["basis"] == basis)]
        ranked, gates = (held[held["ranking"] == name] for name in (RANKED, LEARNED))
        row["kept, ranked"] = f"{_fewest(ranked, n):,.0f}" if len(ranked) else ""
        row["kept, learned"] = " / ".join(
            f"{gate['components']:,.0f} ({gate['faithfulness']:.2f})"
            for _, gate in gates.iterrows()
        )
        rows.append(row)
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> go.Figure:
    """Accuracy over the number frozen, and faithfulness over the number kept: a panel per task."""
    points, cells = _points(table), _cells(table)
    points = points.assign(x=points["components"], y=points["faithfulness"])
    columns = [list(cells["task"].unique()), list(points["label"].unique())]
    found = make_subplots(
        rows=2,
        cols=max(map(len, columns)),
        shared_yaxes=True,
        horizontal_spacing=0.05,
        vertical_spacing=0.2,
        subplot_titles=[plain(label) for row in columns for label in row],
    )
    for basis, colour in zip(dict.fromkeys(table["basis"]), _COLOURS, strict=False):
        for column, label in enumerate(columns[0], start=1):
            own = cells[(cells["basis"] == basis) & (cells["task"] == label)]
            own = own.assign(y=[a.mean for a in own["accuracy"]], x=own["components"])
            ranked = own[(own["method"] == ONE_SHOT) & (own["x"] > 0)]
            _draw(found, basis, colour, (1, column), ranked, own[own["method"] == FROZEN])
        for column, label in enumerate(columns[1], start=1):
            held = points[(points["basis"] == basis) & (points["label"] == label)]
            ranked, gates = (held[held["ranking"] == name] for name in (RANKED, LEARNED))
            _draw(found, basis, colour, (2, column), ranked, gates)
    for column, label in enumerate(columns[0], start=1):
        before = cells[(cells["task"] == label) & (cells["components"] == 0)]["accuracy"].iloc[0]
        found.add_hline(before.mean, line={"color": GREY, "dash": "dot"}, row=1, col=column)
    for name, how in (("ranked", {"mode": "lines+markers"}), ("trained gates", _STAR)):
        found.add_scatter(x=[None], y=[None], name=name, marker_color="black", **how)
    ticks = [m * 10**power for power in range(4) for m in (1, 2, 5)]
    found.update_xaxes(type="log", tickvals=ticks)
    found.update_xaxes(title_text="components frozen", row=1)
    found.update_xaxes(title_text="components kept", row=2)
    found.update_yaxes(tickformat=".0%", row=1)
    found.update_yaxes(title_text="test accuracy", row=1, col=1)
    found.update_yaxes(title_text="faithfulness", row=2, col=1)
    one_legend_entry_each(found)
    found.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=700,
        legend={"orientation": "h", "y": -0.12, "x": 0.5, "xanchor": "center"},
        margin={"t": 50, "b": 120},
    )
    return found


_STAR = {"mode": "markers", "marker": {"symbol": "star", "size": 13}}


def _draw(
    figure: go.Figure,
    basis: str,
    colour: str,
    place: tuple[int, int],
    ranked: pd.DataFrame,
    gates: pd.DataFrame,
) -> None:
    """A basis in a panel: a line for what a ranking reaches, a star for trained gates."""
    shared = {"name": basis, "legendgroup": basis, "row": place[0], "col": place[1]}
    for points, how in ((ranked, {"mode": "lines+markers"}), (gates, _STAR)):
        figure.add_scatter(x=points["x"], y=points["y"], marker_color=colour, **how, **shared)
