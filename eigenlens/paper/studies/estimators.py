"""How true is each estimator, and what does each deviation of the released code do?

Every estimate is compared with the exact effect of really freezing components, drawn from strata of
the first-order score, and used to freeze in one shot. Then the released code, whole and with each
of its deviations taken back alone, is put to the same test.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.decomposition import decompose
from eigenlens.evaluation import evaluate
from eigenlens.exact import exact_effects
from eigenlens.faithfulness import agreement, stratified_sample, top_k
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.identity import defaults
from eigenlens.paper.released_code import (
    ReferenceCode,
    choose_like_reference,
    finetuned,
    score_like_reference,
)
from eigenlens.paper.studies.parts import Parts, part_key, with_models
from eigenlens.paper.studies.repetitions import accuracy, prompts_column
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.paper.studies.views import EACH
from eigenlens.plots.style import BLUE, FULL_WIDTH, ORANGE, TEMPLATE
from eigenlens.refinement import REFINED, REFINED_EXAMPLES, integrated, refined
from eigenlens.scoring import Scores, score
from eigenlens.search import one_shot
from eigenlens.spectra import Spectra
from eigenlens.tasks import Task, load_task

QUESTION = "How true is each estimator, and what does each deviation of the released code do?"
MINUTES = 45
# Criteria of one scoring run, and how many forward passes it takes (a backward pass counts as 2).
_CRITERIA = {"mean": 3, "max": 4, "ucb": 4, "fisher": 4, "position_fisher": 4, "margin": 4}
_ONE_EACH = 3  # a forward and a backward pass of every example
_NODES = 8
_SWITCHES = (
    "one_batch",
    "rolled_reference",
    "worst_case",
    "first_token",
    "raw_inputs",
    "global_quota",
    "summed_bias",
)
_FLOOR = 1e-6  # nats: float32 does not resolve smaller changes of a loss of a few nats


@dataclass(frozen=True)
class Setting:
    """One task on one model.

    Attributes:
        model, label, task, arguments: what to load, and what to call it.
        n_examples: training examples that estimates and exact effects are of.
        seeds: of the splits.
        n_components: drawn for exact effects.
        shares: of components to freeze in one shot, chosen on validation.
        switches: test the deviations of the released code, too.
        n_refined: effects that ``refined`` measures exactly.
    """

    model: str
    label: str
    task: str
    arguments: dict[str, Any]
    n_examples: int
    seeds: tuple[int, ...] = (0,)
    n_components: int = 300
    shares: tuple[float, ...] = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    switches: bool = True
    n_refined: int = REFINED


_SIZES = {"n_train": 300, "n_validation": 50, "n_test": 50}
_TENS = {"low": 10, "high": 30, **_SIZES}
_SEEDS = (0, 1, 2)
SETTINGS = (
    Setting("arith-tiny", "? as product", "ambiguous", {"reading": "product"}, 240, _SEEDS),
    Setting("arith-tiny", "? as sum", "ambiguous", {"reading": "sum"}, 240, _SEEDS),
    Setting("smollm2-135m", "a + b, 10 … 29", "int_add", _TENS, 100),
    Setting("smollm2-135m", "a + b, 10 … 29", "int_add", _TENS, 100, (1, 2), switches=False),
    Setting(
        "smollm2-135m",
        "a x b, 0 … 19",
        "int_mult",
        {"low": 0, "high": 20, **_SIZES},
        100,
        switches=False,
    ),
    Setting(
        "smollm2-135m",
        "COPA",
        "copa",
        {"n_train": 200, "n_validation": 50},
        100,
        switches=False,
        n_refined=300,  # its prompts are long
    ),
)


def run(
    models: tuple[str, ...] = ("arith-tiny", "smollm2-135m"),
    parts: Path | None = None,
) -> ExperimentResult:
    """Run the experiment; about 45 minutes on two cores.

    Args:
        models: of :data:`SETTINGS`.
        parts: folder that keeps finished parts.

    Raises:
        ValueError: no setting is of these models.
    """
    kept = Parts(parts)
    rows: list[dict[str, Any]] = []
    for setting, model in with_models(SETTINGS, models):
        for seed in setting.seeds:
            task = load_task(setting.task, model.tokenizer, **setting.arguments, seed=seed)
            key = part_key(model, setting.model, task, _options(setting), seed)
            found = kept.do(key, partial(_measure, model, task, setting, seed))
            rows += [{**row, "prompts": prompts_column(task.test)} for row in found]
    if not rows:
        raise ValueError(f"No setting of this study is of {', '.join(models)}.")
    table = pd.DataFrame(rows)
    return ExperimentResult(
        name="estimators",
        table=table,
        summary=summary(table),
        figure=figure(table),
        settings={"models": ", ".join(models)},
        text=text(table),
    )


def _options(setting: Setting) -> dict[str, Any]:
    """All that a part depends on besides model, task and seed."""
    chosen = {k: v for k, v in asdict(setting).items() if k not in ("model", "label", "seeds")}
    fixed = {"criteria": _CRITERIA, "nodes": _NODES, "switched": _SWITCHES, "floor": _FLOOR}
    return {**chosen, **fixed, "examples": REFINED_EXAMPLES, "code": defaults(ReferenceCode)}


def _measure(
    model: TransformerBridge, task: Task, setting: Setting, seed: int
) -> list[dict[str, Any]]:
    spectra = decompose(model, progress=False)
    base, drawn, exact = _sample(model, spectra, task, setting, seed)
    rows = _agreements(model, base, task, drawn, exact, setting)
    if setting.switches:
        rows += _switches(model, spectra, task, drawn, exact, setting, seed)
    common = {"model": setting.model, "label": setting.label, "seed": seed}
    return [{**common, **row} for row in rows]


def _sample(
    model: TransformerBridge, spectra: Spectra, task: Task, setting: Setting, seed: int
) -> tuple[Scores, pd.DataFrame, np.ndarray]:
    """Scores on some examples, the drawn components, and their exact effects there."""
    data = task.train.select(range(min(setting.n_examples, len(task.train))))
    every = score(model, spectra, data, criterion="max", progress=False)
    base = every.with_criterion("margin")
    drawn = stratified_sample(
        base.with_criterion("mean").delta_loss, setting.n_components, seed=seed
    )
    rows = drawn["row"].to_numpy()
    return base, drawn, exact_effects(model, base, rows, data, progress=False).mean(1)


def _agreements(
    model: TransformerBridge,
    base: Scores,
    task: Task,
    drawn: pd.DataFrame,
    exact: np.ndarray,
    setting: Setting,
) -> list[dict[str, Any]]:
    data = task.train.select(range(base.n_examples))
    estimates = {name: (base.with_criterion(name), passes) for name, passes in _CRITERIA.items()}
    joint = integrated(model, base, data, steps=_NODES, progress=False)
    # As `eigenlens run` does it: on fewer examples than the exact effects that judge it.
    some = data.select(range(min(REFINED_EXAMPLES, len(data))))
    exactly = refined(model, base, some, count=setting.n_refined, progress=False)
    estimates |= {
        "integrated": (joint, _ONE_EACH * _NODES),
        # At most: of a component's exact effect, only the layers above its own are run.
        "refined": (
            exactly,
            _CRITERIA["margin"] + round((setting.n_refined + _ONE_EACH) * len(some) / len(data)),
        ),
    }
    rows = []
    for name, (scores, passes) in estimates.items():
        chosen = one_shot(model, scores, task.validation, fractions=setting.shares)
        reached = _one_shot(model, chosen.frozen, task)
        rows += _rows(
            scores.delta_loss, drawn, exact, {"estimator": name, "passes": passes, **reached}
        )
    return rows


def _switches(
    model: TransformerBridge,
    spectra: Spectra,
    task: Task,
    drawn: pd.DataFrame,
    exact: np.ndarray,
    setting: Setting,
    seed: int,
) -> list[dict[str, Any]]:
    variants = {
        "released code": ReferenceCode(),
        **{f"… without {name}": ReferenceCode(**{name: False}) for name in _SWITCHES},
        "… without any": ReferenceCode(**dict.fromkeys(_SWITCHES, False)),
    }
    rows = []
    for name, switches in variants.items():
        scores = score_like_reference(model, spectra, task.train, switches, seed=seed)
        found = choose_like_reference(model, scores, task.validation, switches, setting.shares)
        common = {"estimator": name, "passes": None, **_one_shot(model, found.frozen, task)}
        rows += _rows(scores.delta_loss, drawn, exact, common)
    with finetuned(model, task.train, seed=seed):
        tuned = decompose(model, cache=False, progress=False)
        switches = ReferenceCode(finetune=True)
        scores = score_like_reference(model, tuned, task.train, switches, seed=seed)
        nothing = FrozenSet.from_scores(scores, np.array([], dtype=int))
        alone = _one_shot(model, nothing, task)
        found = choose_like_reference(model, scores, task.validation, switches, setting.shares)
        both = _one_shot(model, found.frozen, task)
    rows.append({"estimator": "fine-tuning epoch alone", "stratum": "all", **alone})
    rows.append({"estimator": "released code with fine-tuning", "stratum": "all", **both})
    return rows


def _one_shot(model: TransformerBridge, frozen: FrozenSet, task: Task) -> dict[str, Any]:
    with freeze(model, frozen):
        found = evaluate(model, task.test, choices=False, progress=False)
    return {
        "frozen": frozen.fraction,
        "test_right": int(found.examples["correct"].sum()),
        "test_n": found.n,
        "test_loss": found.loss,
    }


def _rows(
    values: np.ndarray, drawn: pd.DataFrame, exact: np.ndarray, common: dict[str, Any]
) -> list[dict[str, Any]]:
    estimate = values[drawn["row"].to_numpy()]
    table = agreement(estimate, exact, drawn["stratum"].to_numpy(), floor=_FLOOR)
    found = top_k(estimate, exact, len(exact) // 10)
    records = table.astype(object).where(table.notna(), None).to_dict("records")
    return [
        {**common, **{str(k): v for k, v in row.items()}, **(found if i == 0 else {})}
        for i, row in enumerate(records)
    ]


def text(table: pd.DataFrame) -> str:
    """What the page says about the table."""
    return (
        "Each estimator against the exact effect of freezing single components (300 of them on "
        "each split, on 100 training examples, or 240 of arith-tiny; in equal numbers, where there "
        "are as many, from five strata of the absolute first-order score; the top stratum holds "
        "the largest 0.1 %; of arith-tiny these are 2 components, so that its second stratum of "
        "13 is shown instead), and the test "
        "accuracy of freezing its lowest scores in one shot, the share chosen on validation "
        "(in brackets the 95 % interval, of several splits that of a further one), where freezing "
        "nothing was a choice, too. Spearman's ρ is given split by split. `sign` is the share of "
        "equal signs among exact effects above 1e-6 nats. Passes are forward passes, a backward "
        "pass counting as "
        "two. `integrated` answers another "
        "question (the joint path); `refined`, the default of one-shot runs, is `margin` with "
        f"the {REFINED} most doubtful effects (300 on COPA) measured exactly on "
        f"{REFINED_EXAMPLES} of the examples and the estimate as a control variate. The lower "
        "rows are the paper's released code with all deviations on, and with each taken back "
        "alone; it always freezes."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Agreement with exact effects, and the accuracy of freezing in one shot."""
    rows = []
    for (model, label, name), part in table.groupby(["model", "label", "estimator"], sort=False):
        overall = part[part["stratum"] == "all"]
        top = part[part["stratum"] == ("1" if model == "arith-tiny" else "0")]
        reached = accuracy(overall, "test_right", "test_n")
        rows.append(
            {
                "task": label,
                "estimator": name,
                "passes": _number(overall["passes"], "{:.0f}"),
                "Spearman": _by_split(overall["spearman"]),
                "top stratum": _by_split(top["spearman"]),
                "sign": _number(overall["sign"], "{:.1%}"),
                "recall, lowest tenth": _number(overall["recall"]),
                "frozen": " / ".join(f"{value:.1%}" for value in overall["frozen"]),
                "test accuracy": str(reached),
                EACH: reached.each,
            }
        )
    return pd.DataFrame(rows)


def _number(values: pd.Series, form: str = "{:.2f}") -> str:
    found = values.dropna().astype(float)
    return form.format(found.mean()) if len(found) else ""


def _by_split(values: pd.Series) -> str:
    return " / ".join(f"{value:.2f}" for value in values.dropna().astype(float))


def figure(table: pd.DataFrame) -> go.Figure:
    """Spearman's ρ with exact effects by estimator, a panel for each task."""
    names = [*_CRITERIA, "integrated", "refined", "released code"]
    labels = list(dict.fromkeys(table["label"]))
    figure = make_subplots(
        rows=1, cols=len(labels), shared_yaxes=True, horizontal_spacing=0.02, subplot_titles=labels
    )
    for column, label in enumerate(labels, start=1):
        part = table[(table["label"] == label) & table["estimator"].isin(names)]
        tiny = (part["model"] == "arith-tiny").any()
        # The open circle lies on top: two equal values show as one inside the other.
        for title, stratum, marker in (
            ("largest |score|", "1" if tiny else "0", {"color": ORANGE, "symbol": "diamond"}),
            ("all strata", "all", {"color": BLUE, "symbol": "circle-open", "line": {"width": 3}}),
        ):
            own = part[part["stratum"] == stratum].groupby("estimator")["spearman"]
            mean = own.apply(lambda v: v.astype(float).mean()).reindex(names)
            figure.add_trace(
                go.Scatter(
                    x=mean,
                    y=names,
                    mode="markers",
                    marker={"size": 11, **marker},
                    name=title,
                    legendgroup=title,
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(range=[-1.1, 1.1], tickvals=[-1, 0, 1], title_text="ρ with exact ΔL")
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title_text="estimator", col=1)
    figure.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=430,
        legend={"orientation": "h", "y": -0.2, "x": 0.5, "xanchor": "center"},
        margin={"t": 50, "b": 110, "l": 130},
    )
    return figure
