"""What each search reaches at the same number of passes, and what the best one reaches in all.

The budget is counted in passes over the training examples, a backward pass as two forward passes.
Everything is chosen on validation data; accuracies are of test examples that nothing else saw.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from datasets import Dataset
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.decomposition import decompose
from eigenlens.evaluation import Evaluation, evaluate
from eigenlens.freezing import freeze
from eigenlens.identity import defaults
from eigenlens.paper.studies.parts import Parts, part_key, with_models
from eigenlens.paper.studies.repetitions import accuracy, prompts_column
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.paper.studies.views import EACH, INTERVALS
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
)
from eigenlens.refinement import REFINED_EXAMPLES, refined
from eigenlens.scoring import Scores, score
from eigenlens.search import (
    SEARCHES,
    GuardedConfig,
    LearnedConfig,
    SearchResult,
    guarded,
    iterative,
    learned,
    one_shot,
)
from eigenlens.spectra import Spectra
from eigenlens.tasks import Task, load_task

QUESTION = "What does each search reach at the same number of passes?"
MINUTES = 120
METHODS = (
    "one-shot",
    "one-shot, refined",
    "iterative",
    "guarded",
    "guarded, longer",
    "learned, frozen",
    "learned, attenuated",
)
_COLOURS = {
    "before": GREY,
    "one-shot": BLUE,
    "one-shot, refined": SKY,
    "iterative": GREEN,
    "guarded": ORANGE,
    "guarded, longer": ORANGE,
    "learned, frozen": VERMILION,
    "learned, attenuated": PINK,
}
_LONGER = "guarded, longer"
_EQUAL = tuple(method for method in METHODS if method != _LONGER)
_QUICK = ("one-shot", "learned, frozen", "learned, attenuated")


@dataclass(frozen=True)
class Setting:
    """One task on one model: the seeds of its splits, and the methods to run."""

    model: str
    label: str
    task: str
    arguments: dict[str, Any]
    seeds: tuple[int, ...]
    methods: tuple[str, ...]


_SIZES = {"n_train": 300, "n_validation": 50, "n_test": 50}
_TENS = {"low": 10, "high": 30, **_SIZES}
SETTINGS = (
    Setting("arith-tiny", "? as product", "ambiguous", {"reading": "product"}, (0, 1, 2), METHODS),
    Setting("arith-tiny", "? as sum", "ambiguous", {"reading": "sum"}, (0, 1, 2), METHODS),
    Setting("smollm2-135m", "a + b, 10 … 29", "int_add", _TENS, (0,), METHODS),
    Setting("smollm2-135m", "a + b, 10 … 29", "int_add", _TENS, (1, 2), _EQUAL),
    Setting(
        "smollm2-135m",
        "a x b, 0 … 19",
        "int_mult",
        {"low": 0, "high": 20, **_SIZES},
        (0,),
        _QUICK,
    ),
    Setting(
        "smollm2-135m",
        "a + b, 0 … 9",
        "int_add",
        {"low": 0, "high": 10, "n_train": 50, "n_validation": 25, "n_test": 25},
        (0,),
        _QUICK,
    ),
)


def run(
    models: tuple[str, ...] = ("arith-tiny", "smollm2-135m"),
    parts: Path | None = None,
) -> ExperimentResult:
    """Run the experiment; about two hours on two cores.

    Args:
        models: of :data:`SETTINGS`.
        parts: folder that keeps finished parts.

    Raises:
        ValueError: no setting is of these models.
    """
    kept = Parts(parts)
    rows: list[dict[str, Any]] = []
    for setting, model in with_models(SETTINGS, models):
        scored = _Scored(model)
        for seed in setting.seeds:
            task = load_task(setting.task, model.tokenizer, **setting.arguments, seed=seed)
            for method in ("before", *setting.methods):
                key = part_key(model, setting.model, task, _options(), seed, method)
                found = kept.do(key, partial(_measure, scored, task, setting, seed, method))
                rows += [{**row, "prompts": prompts_column(task.test)} for row in found]
    if not rows:
        raise ValueError(f"No setting of this study is of {', '.join(models)}.")
    table = pd.DataFrame(rows).drop_duplicates(["label", "seed", "method", "step"])
    return ExperimentResult(
        name="searches",
        table=table,
        summary=summary(table),
        figure=figure(table),
        settings={"models": ", ".join(models)},
        text=text(table),
    )


class _Scored:
    """A model and its decomposition, made when first needed."""

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model

    @cached_property
    def _spectra(self) -> Spectra:
        return decompose(self.model, progress=False)

    def scores(self, task: Task) -> tuple[Scores, float]:
        """Scores on the training examples, and the seconds that they took."""
        spectra, start = self._spectra, time.perf_counter()
        made = score(self.model, spectra, task.train, criterion="fisher", progress=False)
        return made, time.perf_counter() - start


def _options() -> dict[str, Any]:
    """All options of the searches, defaults among them."""
    searches = {name: defaults(search) for name, search in SEARCHES.items()}
    given = [_LEARNED_STEPS, _IN_TRIALS, _REFINED, _SHARE, _MINIBATCH, REFINED_EXAMPLES]
    configs = [defaults(LearnedConfig), defaults(GuardedConfig)]
    return {"searches": searches, "configs": configs, "given": given}


def _measure(
    scored: _Scored, task: Task, setting: Setting, seed: int, method: str
) -> list[dict[str, Any]]:
    """The trace of a search; its last row holds what the chosen step does on test."""
    model = scored.model
    common = {"model": setting.model, "label": setting.label, "seed": seed, "method": method}
    if method == "before":
        found = evaluate(model, task.test, progress=False)
        return [{**common, "step": -1, "components": 0, "share": 0.0, **_test(found)}]
    base, seconds = scored.scores(task)
    start = time.perf_counter()
    result = _SEARCHES[method](model, base, task)
    seconds += time.perf_counter() - start
    with freeze(model, result.frozen):
        found = evaluate(model, task.test, progress=False)
    plain = result.trace.astype(object).where(result.trace.notna(), None)
    trace: list[dict[str, Any]] = [
        {str(k): v for k, v in row.items()} for row in plain.to_dict("records")
    ]
    last = {
        "step": -1,
        "components": len(result.frozen),
        "share": result.frozen.fraction,
        "mean_strength": float(result.frozen.components["strength"].mean()),
        "passes": _passes(method, result, len(task.train)),
        "seconds": seconds,
        **_test(found),
    }
    return [{**common, **row} for row in [*trace, last]]


def _test(found: Evaluation) -> dict[str, Any]:
    right = int(found.examples["correct"].sum())
    return {"test_right": right, "test_n": found.n, "test_loss": found.loss}


_SCORING = 4.0  # forward for the means, forward, backward as two
_STEP = 3.0  # the means are known
_LEARNED_STEPS = LearnedConfig().steps
_IN_TRIALS = 0.73  # steps that guarded has for one of iterative, since it also tries sets
_REFINED = 500  # as many passes as learned, on 300 examples
_SHARE = 0.002  # of the components in a step: three of arith-tiny's, 196 of SmolLM2's
_MINIBATCH = 50


def _some(task: Task) -> Dataset:
    return task.train.select(range(min(REFINED_EXAMPLES, len(task.train))))


def _as_long(task: Task, share: float = 1.0) -> int:
    """Steps over all training examples that take this share of the passes of ``learned``."""
    return round(share * _LEARNED_STEPS * min(_MINIBATCH, len(task.train)) / len(task.train))


def _iterative(model: TransformerBridge, base: Scores, task: Task) -> SearchResult:
    options: dict[str, Any] = {"step": _SHARE, "steps": _as_long(task), "progress": False}
    return iterative(model, base, task.train, task.validation, **options)


def _guarded(share: float, model: TransformerBridge, base: Scores, task: Task) -> SearchResult:
    config = GuardedConfig(step=_SHARE, steps=_as_long(task, share))
    return guarded(model, base, task.train, task.validation, config, progress=False)


def _learned(attenuate: bool, model: TransformerBridge, base: Scores, task: Task) -> SearchResult:
    config = LearnedConfig(attenuate=attenuate, batch_size=_MINIBATCH)
    return learned(model, base, task.train, task.validation, config, progress=False)


_SEARCHES: dict[str, Callable[[TransformerBridge, Scores, Task], SearchResult]] = {
    "one-shot": lambda model, base, task: one_shot(model, base, task.validation),
    "one-shot, refined": lambda model, base, task: one_shot(
        model,
        refined(model, base, _some(task), count=_REFINED, progress=False),
        task.validation,
    ),
    "iterative": _iterative,
    "guarded": partial(_guarded, _IN_TRIALS),
    "guarded, longer": partial(_guarded, 1.0),
    "learned, frozen": partial(_learned, False),
    "learned, attenuated": partial(_learned, True),
}


def _passes(method: str, result: SearchResult, n_train: int) -> float:
    """Forward passes over the training examples that the search took, scoring included."""
    steps = int(result.trace["step"].iloc[-1])
    if method == "one-shot":
        return _SCORING
    if method == "one-shot, refined":  # at most: exact effects run the layers above their own
        return _SCORING + (_REFINED + _STEP) * min(REFINED_EXAMPLES, n_train) / n_train
    if method.startswith("iterative"):
        return _SCORING + _STEP * steps
    if method.startswith("guarded"):  # a quarter of the examples is held out for calibration
        return float(_SCORING + 0.75 * _STEP * steps + 0.25 * (1 + result.trace["tried"].sum()))
    return _SCORING + _STEP * steps * min(_MINIBATCH, n_train) / n_train


def text(table: pd.DataFrame) -> str:
    """What the page says about the table."""
    return (
        f"{INTERVALS} Passes are forward passes over the training "
        "examples, a backward pass counting as two; looks at validation are not counted. "
        "`one-shot`, `iterative` and `guarded` rank by `fisher`, which costs what `margin` does "
        "and errs less on SmolLM2 (see estimators); `refined` measures the "
        f"{_REFINED} most doubtful effects. `iterative` and `guarded` freeze {_SHARE:.1%} in "
        "their first step, `iterative` as many in each; `guarded, longer` has a third more passes. "
        "Freezing nothing was a choice. Minutes are of the search on 2 cores, scoring included, "
        "decomposition not, and "
        "are left out where other work shared the cores."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Test accuracy, cost and share of components, added up over the seeds."""
    final = table[table["step"] == -1]
    rows = []
    for (model, label, method), part in final.groupby(["model", "label", "method"], sort=False):
        found = accuracy(part, "test_right", "test_n")
        rows.append(
            {
                "model": model,
                "task": label,
                "method": method,
                "seeds": len(part),
                "test accuracy": str(found),
                EACH: found.each,
                "loss (nats)": f"{part['test_loss'].mean():.2f}",
                "components": " / ".join(f"{share:.2%}" for share in part["share"]),
                "passes": "" if method == "before" else f"{part['passes'].mean():.0f}",
                "minutes": _minutes(part["seconds"]),
            }
        )
    order = {name: i for i, name in enumerate(("before", *METHODS))}
    page = pd.DataFrame(rows)
    labels = {label: i for i, label in enumerate(dict.fromkeys(page["task"]))}
    return page.sort_values(
        ["task", "method"], key=lambda c: c.map(labels if c.name == "task" else order)
    )


def _minutes(seconds: pd.Series) -> str:
    return f"{seconds.mean() / 60:.1f}" if seconds.notna().all() else ""


def figure(table: pd.DataFrame) -> go.Figure:
    """Test accuracy with its interval by search, a panel for each task."""
    labels = list(dict.fromkeys(table["label"]))
    figure = make_subplots(
        rows=1, cols=len(labels), shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=labels
    )
    final = table[table["step"] == -1]
    for column, label in enumerate(labels, start=1):
        for method in ("before", *METHODS):
            part = final[(final["label"] == label) & (final["method"] == method)]
            if len(part):
                figure.add_trace(_bar(part, method), row=1, col=column)
    figure.update_xaxes(showticklabels=False, title_text="method")
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    figure.update_yaxes(title_text="test accuracy", col=1)
    one_legend_entry_each(figure)
    figure.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=420,
        legend={"orientation": "h", "y": -0.16, "x": 0.5, "xanchor": "center"},
        margin={"t": 50, "b": 110},
    )
    return figure


def _bar(part: pd.DataFrame, method: str) -> go.Bar:
    found = accuracy(part, "test_right", "test_n")
    low, high = found.interval
    return go.Bar(
        x=[method],
        y=[found.mean],
        error_y={
            "type": "data",
            "array": [high - found.mean],
            "arrayminus": [found.mean - low],
            "thickness": 1.2,
            "width": 3,
        },
        marker={
            "color": _COLOURS[method],
            "pattern": {"shape": "/" if method == _LONGER else "", "fillmode": "overlay"},
        },
        name=method,
        legendgroup=method,
    )
