"""Which components suffice for a task when all others are frozen?

A set is judged by its normalised faithfulness on the test split, of ``KL(unedited ‖ edited)`` over
the answers (:func:`eigenlens.faithfulness.faithfulness_of`): 1 where the model's answers are what
they were, 0 where they are as with everything frozen. Rankings keep their highest at a range of
shares; ``learned(keep=True)`` finds one set for each price.

How well a circuit is found that is known: :mod:`eigenlens.paper.studies.known_circuit`.
"""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.decomposition import decompose
from eigenlens.evaluation import evaluate
from eigenlens.faithfulness import curve_areas, faithfulness_curve, faithfulness_of
from eigenlens.freezing import freeze
from eigenlens.metrics import kl_to_unedited
from eigenlens.paper.studies.by_split import Measurement, Split, study_by_split
from eigenlens.paper.studies.config import TasksConfig
from eigenlens.paper.studies.known_circuit import find_known_circuit
from eigenlens.plots.style import (
    BLUE,
    FULL_WIDTH,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    TEMPLATE,
    VERMILION,
    one_legend_entry_each,
    plain,
)
from eigenlens.scoring import Scores, score
from eigenlens.search import LearnedConfig, learned
from eigenlens.tasks import Task

QUESTION = "How few components suffice for a task, and which ranking finds them?"
MINUTES = 15
LEARNED = "learned to keep"
ENOUGH = 0.9  # faithfulness that the page asks for
_COLOURS = {
    LEARNED: BLUE,
    "margin": VERMILION,
    "fisher": ORANGE,
    "size of mean": GREEN,
    "largest σ": PINK,
    "random": GREY,
}


class SufficiencyConfig(TasksConfig):
    """What the study runs.

    Attributes:
        prices: of keeping all components, in nats: one learned set each.
        shares: of the components that rankings keep.
        circuit_on: labels of tasks in whose models a known circuit is planted.
    """

    prices: tuple[float, ...] = (3.0, 10.0, 30.0, 50.0, 100.0)
    shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
    circuit_on: tuple[str, ...] = ("a + b",)


def _measurements(split: Split, config: SufficiencyConfig) -> Iterator[Measurement]:
    """What is scored is scored once."""
    model, task, batch_size = split.loaded, split.task, split.setting.batch_size
    scores = cache(partial(_scored, model, task, batch_size))
    options: dict[str, Any] = {"batch_size": batch_size}

    def rankings() -> list[dict[str, Any]]:
        return _rankings(model, scores(), task, config.shares, batch_size)

    yield Measurement(rankings, {**options, "shares": config.shares}, ("rankings",))
    for price in config.prices:
        searched = LearnedConfig(sparsity=price, batch_size=batch_size)

        def kept(searched: LearnedConfig = searched) -> list[dict[str, Any]]:
            return kept_by_gates(model, scores(), task, searched)

        yield Measurement(kept, {**options, "search": searched.model_dump()}, ("learned",))
    if split.label in config.circuit_on:
        circuit = partial(find_known_circuit, model, task, batch_size, rankings_of)
        yield Measurement(circuit, options, ("circuit",))


run = study_by_split(__name__, SufficiencyConfig, _measurements, {"prices": "prices"})


def _scored(model: TransformerBridge, task: Task, batch_size: int) -> Scores:
    spectra = decompose(model, progress=False)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    return score(model, spectra, task.train, criterion="margin", **options)


def rankings_of(scores: Scores) -> dict[str, np.ndarray]:
    """What is kept first has the highest value: by scores, by σ, and by a coin."""
    return {
        "margin": scores.with_criterion("margin").delta_loss,
        "fisher": scores.with_criterion("fisher").delta_loss,
        "size of mean": np.abs(scores.with_criterion("mean").delta_loss),
        "largest σ": scores.components["sigma"].to_numpy(),
        "random": np.random.default_rng(0).random(len(scores)),
    }


def _rankings(
    model: TransformerBridge,
    scores: Scores,
    task: Task,
    shares: tuple[float, ...],
    batch_size: int,
) -> list[dict[str, Any]]:
    options: dict[str, Any] = {"metric": kl_to_unedited(model, task.test), "kept": shares}
    options |= {"batch_size": batch_size}
    rows: list[dict[str, Any]] = []
    for name, values in rankings_of(scores).items():
        curve = faithfulness_curve(model, scores, task.test, values=values, **options)
        rows += [{"ranking": name, **row} for row in records(curve)]
    return rows


def kept_by_gates(
    model: TransformerBridge, scores: Scores, task: Task, config: LearnedConfig
) -> list[dict[str, Any]]:
    """The set that ``learned(keep=True)`` finds, and the ends of its curve."""
    found = learned(
        model, scores, task.train, task.validation, config, keep=True, progress=False
    ).frozen
    curve = faithfulness_of(
        model,
        scores,
        [found],
        task.test,
        metric=kl_to_unedited(model, task.test),
        batch_size=config.batch_size,
    )
    with freeze(model, found):
        accuracy = evaluate(model, task.test, choices=False, progress=False).accuracy
    price = {"ranking": LEARNED, "price": config.sparsity}
    rows = [{**price, **row} for row in records(curve)]
    return [{**row, "accuracy": accuracy} if 0 < row["kept"] < 1 else row for row in rows]


def records(curve: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a curve, as a part keeps them."""
    return [{str(key): value for key, value in row.items()} for row in curve.to_dict("records")]


def curves(table: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Faithfulness over the share kept by task and ranking, seeds averaged."""
    ends = pd.DataFrame({"kept": [0.0, 1.0], "faithfulness": [0.0, 1.0]})
    points = table[table["kept"].between(0, 1, inclusive="neither")]
    found = {}
    for key, part in points.groupby(["label", "ranking"], sort=False):
        label, ranking = (str(name) for name in key)
        by = part["price" if ranking == LEARNED else "kept"].to_numpy()
        mean = part[["kept", "faithfulness"]].groupby(by).mean()
        whole = pd.concat([ends, mean]).sort_values("kept", kind="stable")
        found[label, ranking] = whole.reset_index(drop=True)
    return found


def text(table: pd.DataFrame) -> str:
    """What was found, and what the columns are."""
    sizes: dict[str, dict[str, float]] = {}
    for (label, ranking), curve in curves(table).items():
        sizes.setdefault(label, {})[ranking] = enough(curve)
    found = "; ".join(_smallest(label, own) for label, own in sizes.items())
    circuit = "precision" in table and table["precision"].notna().any()
    return (
        "Gates that are trained to keep find a set that holds the task with fewer components than "
        f"any ranking. For a faithfulness of {ENOUGH}: {found}. "
        "A component is kept or frozen at its mean; faithfulness is 1 where the model's answers "
        "are what they were and 0 where they are as with everything frozen, by the divergence "
        "KL(unedited ‖ edited) on test. It is below 0 where a part does worse than nothing. CPR "
        "is the area under it over the share kept, CMD the area between it and 1 (MIB, arXiv "
        "2504.13151). A learned set is one point for each price of keeping, a ranking is one "
        "order for all shares, measured at a few." + (_CIRCUIT if circuit else "")
    )


def _smallest(label: str, sizes: dict[str, float]) -> str:
    """How much was learned to be kept, beside the best ranking."""
    others = {name: size for name, size in sizes.items() if name != LEARNED}
    best = min(others, key=lambda name: others[name])
    ranking = f"the best ranking ({best}) takes {others[best]:.0%}"
    return f"{sizes[LEARNED]:.1%} for {label}, where {ranking}"


_CIRCUIT = (
    " Rows with a precision are of a model whose circuit is known: a part that does the task (by "
    "the same search on the whole model) was left in the weights, all other components were taken "
    "out, but for heads that nothing reads, which keep their queries, keys and values. Precision "
    "is the share of the circuit in what is kept, recall the share of the circuit that is kept; "
    "rankings keep as many as the circuit has. That `size of mean` finds all of it is no merit: "
    "what was taken out has a slope of exactly 0."
)


def enough(curve: pd.DataFrame) -> float:
    """The smallest share measured from which on the faithfulness suffices."""
    good = curve["faithfulness"].to_numpy() >= ENOUGH
    return float(curve["kept"][np.flatnonzero(~good)[-1] + 1 if (~good).any() else 0])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Areas of each ranking, and how well it finds a circuit that is known."""
    rows: list[dict[str, Any]] = []
    for (label, ranking), curve in curves(table).items():
        areas = curve_areas(curve)
        row = {"task": label, "kept by": ranking, "CPR": areas["cpr"], "CMD": areas["cmd"]}
        row[f"kept for {ENOUGH}"] = f"{enough(curve):.1%}"
        part = table[(table["label"] == label) & (table["ranking"] == ranking)]
        known = part[part["precision"].notna()] if "precision" in part else part[:0]
        for column in ("precision", "recall"):
            row[column] = f"{known[column].mean():.1%}" if len(known) else ""
        rows.append(row)
    return pd.DataFrame(rows).round(3)


def figure(table: pd.DataFrame) -> go.Figure:
    """A panel per task, a line per ranking, over the share kept."""
    drawn = curves(table)
    labels = list(dict.fromkeys(label for label, _ in drawn))
    found = make_subplots(
        rows=1,
        cols=len(labels),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[plain(label) for label in labels],
    )
    for (label, ranking), curve in drawn.items():
        inner = curve[curve["kept"] > 0]
        found.add_trace(
            go.Scatter(
                x=inner["kept"],
                y=inner["faithfulness"],
                mode="lines+markers",
                line={
                    "color": _COLOURS[ranking],
                    "dash": "dot" if ranking == "random" else "solid",
                },
                marker={"size": 8 if ranking == LEARNED else 5},
                name=ranking,
                legendgroup=ranking,
            ),
            row=1,
            col=labels.index(label) + 1,
        )
    found.add_hline(y=1, line={"color": GREY, "dash": "dot", "width": 1})
    found.update_xaxes(
        type="log",
        title_text="share of components kept",
        tickvals=[0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1],
        tickformat=".1~%",
    )
    found.update_yaxes(range=[-0.6, 1.1])
    found.update_yaxes(title_text="faithfulness", col=1)
    one_legend_entry_each(found)
    found.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=430,
        legend={"orientation": "h", "y": -0.22, "x": 0.5, "xanchor": "center"},
        margin={"t": 50, "b": 110},
    )
    return found
