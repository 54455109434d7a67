"""Does freezing uncover a computation that a model has but does not use?

arith-tiny answers ``a ? b =`` half the time with the sum and half with the product. For either
reading: freeze components that were scored on one part of the ``?`` prompts, choose their number on
a second, and test on a third that neither saw. What happens to ``+`` and ``x`` is a side effect,
measured on half of their pairs (where they are protected, on the other half), and random components
at the same budget are the control.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.decomposition import decompose
from eigenlens.evaluation import Evaluation, evaluate, preference
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.models import load_model
from eigenlens.paper.studies.repetitions import Accuracy, accuracy, prompts_column
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.paper.studies.views import EACH
from eigenlens.plots.style import (
    BLUE,
    FULL_WIDTH,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    TEMPLATE,
    VERMILION,
)
from eigenlens.scoring import Scores, score
from eigenlens.search import (
    GuardedConfig,
    LearnedConfig,
    Protection,
    guarded,
    iterative,
    learned,
)
from eigenlens.selection import select
from eigenlens.spectra import Spectra
from eigenlens.tasks import Task, load_task

QUESTION = "Does freezing uncover a computation that a model has but does not use?"
MINUTES = 7
COUNTS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 45, 60, 90, 150, 300)
READINGS = ("product", "sum")
_PLAIN = {"low": 0, "high": 20, "n_train": 199, "n_validation": 1, "n_test": 200}
_COLOURS = {
    "margin, one-shot": BLUE,
    "mean, one-shot": ORANGE,
    "max, one-shot": PINK,
    "random": GREY,
    "margin, iterative": GREEN,
    "learned, frozen": VERMILION,
}


def run(split_seeds: tuple[int, ...] = (0, 1, 2), random_seeds: int = 5) -> ExperimentResult:
    """Run the experiment; about seven minutes on two cores.

    Args:
        split_seeds: of the division of ``?`` pairs into train, validation and test.
        random_seeds: draws of random components for each split.
    """
    model = load_model("arith-tiny", device="cpu")
    spectra = decompose(model, progress=False)
    plain = {
        "+": load_task("int_add", model.tokenizer, **_PLAIN),
        "x": load_task("int_mult", model.tokenizer, **_PLAIN),
    }
    rows: list[dict[str, Any]] = []
    for reading in READINGS:
        for seed in split_seeds:
            task = load_task("ambiguous", model.tokenizer, reading=reading, seed=seed)
            for row in _one_split(model, spectra, task, plain, random_seeds):
                names = {"reading": reading, "seed": seed, "prompts": prompts_column(task.test)}
                rows.append({**names, **row})
    return _result(pd.DataFrame(rows), split_seeds, random_seeds)


def _result(
    table: pd.DataFrame, split_seeds: tuple[int, ...], random_seeds: int
) -> ExperimentResult:
    return ExperimentResult(
        name="ambiguous",
        table=table,
        summary=summary(table),
        figure=figure(table),
        settings={"split_seeds": split_seeds, "random_seeds": random_seeds},
        text=text(table),
    )


def _one_split(
    model: TransformerBridge,
    spectra: Spectra,
    task: Task,
    plain: dict[str, Task],
    random_seeds: int,
) -> Iterator[dict[str, Any]]:
    every = score(model, spectra, task.train, criterion="max", batch_size=240, progress=False)
    scores = every.with_criterion("margin")
    yield from _measure(model, task, plain, "before", [select(scores, count=0)])
    for criterion in ("margin", "mean", "max"):
        ranked = scores.with_criterion(criterion)
        sets = [select(ranked, count=count) for count in COUNTS]
        yield from _measure(model, task, plain, f"{criterion}, one-shot", sets)
    for seed in range(random_seeds):
        yield from _measure(model, task, plain, "random", _random_sets(scores, seed), draw=seed)
    data = (model, scores, task.train, task.validation)
    found = iterative(*data, step=3, steps=20, batch_size=240, progress=False)
    yield from _measure(model, task, plain, "margin, iterative", [found.frozen])
    found = guarded(*data, GuardedConfig(step=3, steps=20, batch_size=240), progress=False)
    yield from _measure(model, task, plain, "margin, guarded", [found.frozen])
    for attenuate in (False, True):
        found = learned(*data, LearnedConfig(attenuate=attenuate), progress=False)
        name = f"learned, {'attenuated' if attenuate else 'frozen'}"
        yield from _measure(model, task, plain, name, [found.frozen])
    protect = Protection(model, {name: task.train for name, task in plain.items()}, bound=0.05)
    found = learned(*data, protect=protect, progress=False)
    yield from _measure(model, task, plain, "learned, frozen, + and x protected", [found.frozen])


def _random_sets(scores: Scores, seed: int) -> list[FrozenSet]:
    order = np.random.default_rng(seed).permutation(len(scores))
    return [FrozenSet.from_scores(scores, np.sort(order[:count])) for count in COUNTS]


def _measure(
    model: TransformerBridge,
    task: Task,
    plain: dict[str, Task],
    method: str,
    sets: list[FrozenSet],
    draw: int = 0,
) -> Iterator[dict[str, Any]]:
    """Every budget of a method; ``chosen`` marks the best on validation."""
    found = []
    for frozen in sets:
        with freeze(model, frozen):
            split = {
                name: evaluate(model, data, batch_size=400, progress=False)
                for name, data in {
                    "validation": task.validation,
                    "test": task.test,
                    **{name: task.test for name, task in plain.items()},
                }.items()
            }
        found.append((frozen, split))
    looks = [(split["validation"], len(frozen)) for frozen, split in found]
    ranks = [preference(look.accuracy, look.loss, count) for look, count in looks]
    best = ranks.index(max(ranks))
    for i, (frozen, split) in enumerate(found):
        yield {
            "method": method,
            "draw": draw,
            "components": len(frozen),
            "of": frozen.n_candidates,
            "chosen": i == best,
            **_numbers(split),
        }


def _numbers(split: dict[str, Evaluation]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for name, found in split.items():
        numbers[f"{name}_right"] = int(found.examples["correct"].sum())
        numbers[f"{name}_n"] = found.n
    return numbers


def _at_chosen_budget(table: pd.DataFrame) -> pd.DataFrame:
    """Chosen rows; random components at the budget that ``margin, one-shot`` chose."""
    chosen = table[table["chosen"] & (table["method"] != "random")]
    budget = chosen[chosen["method"] == "margin, one-shot"].set_index(["reading", "seed"])
    random = table[table["method"] == "random"]
    same = budget["components"].reindex(pd.MultiIndex.from_frame(random[["reading", "seed"]]))
    return pd.concat([chosen, random[random["components"].to_numpy() == same.to_numpy()]])


def text(table: pd.DataFrame) -> str:
    """What the page says about the table."""
    return (
        "arith-tiny knows `a + b =` and `a x b =` and was trained to answer `a ? b =` half the "
        "time with the sum and half with the product. Components were scored on 240 `?` pairs, "
        "their number was chosen on 80, and accuracies are of 80 unseen pairs of each of three "
        "splits. Brackets hold 95 % intervals for the mean over further splits: they grow with the "
        "spread between splits, and pairs that two splits test on count once. `each seed` has the "
        "accuracy of every split, of random components the lowest to the highest draw. "
        "`+` and `x` are over 200 pairs each, the same for every split; where they were protected, "
        "199 others were, and these were not seen. The target of 95 % on both "
        "readings is reached by learned gates, frozen and attenuated, and by no ranking. Freezing "
        "the product's rivals costs `+` two thirds of its answers, unless `+` and `x` are "
        "protected during the search (to within 0.05 nats per answer token): then both keep 99.5 % "
        "or more, for a few points of the product that lie within its intervals."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracies at the chosen budgets, added up over the splits."""
    rows = []
    for (reading, method), part in _at_chosen_budget(table).groupby(
        ["reading", "method"], sort=False
    ):
        row: dict[str, Any] = {
            "reading": reading,
            "method": method,
            "components": " / ".join(map(str, dict.fromkeys(part["components"]))),
        }
        for name in ("test", "+", "x"):
            row[name] = str(_accuracy(part, name))
            if name == "test":
                row[EACH] = _accuracy(part, name).each
        rows.append(row)
    return pd.DataFrame(rows).sort_values("reading", kind="stable")


def _accuracy(part: pd.DataFrame, name: str) -> Accuracy:
    """Of ``?`` each split has pairs of its own; those of ``+`` and ``x`` are always the same."""
    told = part if name == "test" else part.drop(columns="prompts", errors="ignore")
    return accuracy(told, f"{name}_right", f"{name}_n")


def figure(table: pd.DataFrame) -> go.Figure:
    """Test accuracy against the number of frozen components, a panel for each reading."""
    figure = make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        horizontal_spacing=0.06,
        subplot_titles=[f"? read as {reading}" for reading in READINGS],
    )
    for column, reading in enumerate(READINGS, start=1):
        part = table[table["reading"] == reading]
        base = part[part["method"] == "before"]
        before = base["test_right"].sum() / base["test_n"].sum()
        figure.add_trace(
            go.Scatter(
                x=[COUNTS[0], COUNTS[-1]],
                y=[before, before],
                mode="lines",
                line={"color": "#444444", "dash": "dot", "width": 1.5},
                name="before",
                legendgroup="before",
                showlegend=column == 1,
            ),
            row=1,
            col=column,
        )
        for method, colour in _COLOURS.items():
            own = part[part["method"] == method]
            if method in ("margin, iterative", "learned, frozen"):
                own = own.assign(components=own["components"].median())
            reached = {
                float(str(count)): _accuracy(same, "test")
                for count, same in own.groupby("components")
            }
            figure.add_trace(_curve(reached, method, colour, first=column == 1), row=1, col=column)
    figure.update_xaxes(
        type="log",
        tickvals=[1, 3, 10, 30, 100, 300],
        title_text=f"components frozen (of {table['of'].max():,})",
    )
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    figure.update_yaxes(title_text="test accuracy", col=1)
    figure.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=460,
        legend={"orientation": "h", "y": -0.22, "x": 0.5, "xanchor": "center"},
        margin={"t": 50, "b": 130},
    )
    return figure


def _curve(reached: dict[float, Accuracy], method: str, colour: str, *, first: bool) -> go.Scatter:
    one = len(reached) == 1
    return go.Scatter(
        x=list(reached),
        y=[found.mean for found in reached.values()],
        error_y={
            "array": [found.interval[1] - found.mean for found in reached.values()],
            "arrayminus": [found.mean - found.interval[0] for found in reached.values()],
            "thickness": 1,
            "width": 3,
        },
        mode="markers" if one else "lines+markers",
        marker={"size": 12, "symbol": "diamond"} if one else {"size": 6},
        line={"color": colour},
        name=method,
        legendgroup=method,
        showlegend=first,
    )
