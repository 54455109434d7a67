"""Whose scores find the most harmful components with the fewest passes?

Every component is frozen for real, one at a time, so that the k most harmful ones are known. Each
method ranks all components, and its lowest are verified by exact effects one after the other: a
ranking that is right finds the k after k verifications. A budget counts both, what the scores cost
and a forward pass for each verified component.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import scipy.stats
from plotly.subplots import make_subplots
from pydantic import Field
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.decomposition import decompose
from eigenlens.exact import exact_effects
from eigenlens.paper.studies.by_split import Measurement, Split, study_by_split
from eigenlens.paper.studies.config import Data, TasksConfig
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
)
from eigenlens.scoring import score
from eigenlens.spectra import Spectra
from eigenlens.tasks import Task

QUESTION = "Whose scores find the most harmful components with the fewest passes?"
MINUTES = 3
METHODS = {
    "margin": "margin",
    "mean": "attribution patching",
    "grad_activation": "gradient × activation",
    "eap_ig_inputs": "EAP-IG, inputs",
    "eap_ig_activations": "EAP-IG, activations",
    "atp_qk": "AtP, QK correction",
    "atp_drop": "AtP, GradDrop",
    "atp_star": "AtP*",
    "random": "random order",
}
BUDGETS = (50, 200, 800)  # passes over the data, scores included
_SIGMA = "largest σ"


class PeersConfig(TasksConfig):
    """What the study runs.

    Attributes:
        n_examples: training examples that scores and exact effects are of.
        steps: nodes of the paths of EAP-IG.
        k: how many of the most harmful components are to be found.
    """

    n_examples: int = Field(default=80, ge=1)
    steps: int = Field(default=5, ge=1)
    k: tuple[int, ...] = (1, 5, 20)


def _measurements(split: Split, config: PeersConfig) -> Iterator[Measurement]:
    options = config.model_dump(include={"n_examples", "steps", "k"})
    options |= {"batch_size": split.setting.batch_size, "methods": METHODS}
    made = partial(_measure, split.loaded, split.task, split.setting, split.seed, config)
    yield Measurement(made, options)


run = study_by_split(
    __name__, PeersConfig, _measurements, {"examples": "n_examples", "steps": "steps"}
)


def _measure(
    model: TransformerBridge, task: Task, setting: Data, seed: int, config: PeersConfig
) -> list[dict[str, Any]]:
    data = task.train.select(range(min(config.n_examples, len(task.train))))
    spectra = decompose(model, progress=False)
    options: dict[str, Any] = {"batch_size": setting.batch_size, "progress": False}
    base = score(model, spectra, data, criterion="margin", **options)
    every = np.arange(len(base))
    exact = exact_effects(model, base, every, data, **options).mean(1)
    rankings = {"margin": base.delta_loss, _SIGMA: -base.components["sigma"].to_numpy()}
    for criterion in METHODS:
        if criterion not in (*rankings, "random"):
            found = score(model, spectra, data, criterion=criterion, steps=config.steps, **options)
            rankings[criterion] = found.delta_loss
    rankings["random"] = np.random.default_rng(seed).permutation(len(base)).astype(float)
    return [
        {
            "method": method,
            "passes": _cost(method, model, spectra, config.steps),
            "components": len(base),
            "spearman": float(scipy.stats.spearmanr(values, exact).statistic),
            "magnitude": float(scipy.stats.spearmanr(np.abs(values), np.abs(exact)).statistic),
            "k": k,
            "harm": float(-np.sort(exact)[:k].sum()),
            # Verifications after which each of the k is found, in the order of finding.
            "found_at": " ".join(map(str, places_of(values, exact, k))),
        }
        for method, values in rankings.items()
        for k in config.k
    ]


def places_of(values: np.ndarray, exact: np.ndarray, k: int) -> list[int]:
    """Places (from 1) of the k lowest exact effects in the order of rising values."""
    place = np.empty(len(values), dtype=int)
    place[np.argsort(values, kind="stable")] = np.arange(1, len(values) + 1)
    return np.sort(place[np.argsort(exact, kind="stable")[:k]]).tolist()


def _cost(method: str, model: TransformerBridge, spectra: Spectra, steps: int) -> float:
    """Forward passes over the data, a backward pass counting as two."""
    n_layers = len(model.blocks)
    before = [s for s in spectra.values() if s.site.kind in ("W_Q", "W_K")]
    # The share of a forward pass that one attention layer takes, by its weights.
    attention = [s for s in spectra.values() if s.site.kind in ("W_Q", "W_K", "W_V", "W_O")]
    sizes = [s.site.find(model).flat_weight.numel() for s in spectra.values()]
    own = [s.site.find(model).flat_weight.numel() for s in attention]
    layer = sum(own) / sum(sizes) / n_layers
    correction = 1 + layer * sum(s.sigma.numel() + 2 for s in before)  # and its inputs
    drop = 3 * n_layers
    costs = {
        "margin": 4,
        "mean": 3,
        "grad_activation": 3,
        "eap_ig_inputs": 4 + 3 * steps,  # means of coordinates and embeddings, coordinates
        "eap_ig_activations": 2 + 3 * steps * len(spectra),
        "atp_qk": 2 + 3 + correction,
        "atp_drop": 2 + 3 + drop,
        "atp_star": 2 + 3 + drop + correction,
    }
    return float(costs.get(method, 0))


def _label(method: str) -> str:
    return METHODS.get(method, method)


def _found_at(row: pd.Series) -> np.ndarray:
    return np.array(row["found_at"].split(), dtype=int)


def _within(row: pd.Series, budget: int) -> int:
    """How many of the k are found with so many passes, scores included."""
    return int((_found_at(row) <= budget - row["passes"]).sum())


def text(table: pd.DataFrame) -> str:
    """What the page says about the table."""
    return (
        f"{_finding(table)} Every component was frozen alone for real, and the k components that "
        "lower the loss most are to be found by verifying each method's lowest scores one after "
        "the other. `all k at` is how many are verified when the last of the k is found, `half` "
        "when half are. `found` is how many of the largest k of the table are found within a "
        "budget of forward passes over the data, what the scores cost included: a backward pass "
        "counts as two, a verification as one, and the run of one attention layer that AtP's QK "
        "correction takes for each query and key coordinate as that layer's share of the weights. "
        "Spearman's ρ is with exact effects, and that of magnitudes with magnitudes, which is what "
        "GradDrop estimates; its sign is that of attribution patching. Several tasks or splits "
        "are given one after the other; the figure shows the first split."
    )


def _finding(table: pd.DataFrame) -> str:
    """The first sentence: what methods find within budgets, over all tasks and splits."""
    most = table[table["k"] == table["k"].max()]
    k = int(most["k"].iloc[0])

    def shares(budget: int) -> str:
        found = most.assign(found=most.apply(partial(_within, budget=budget), axis=1))
        mean = found.groupby("method", sort=False)["found"].mean().sort_values(ascending=False)
        listed = [f"{_label(str(name))} {value / k:.0%}" for name, value in mean.items()]
        return f"within {budget} passes {listed[0]}, then {', '.join(listed[1:])}"

    return (
        f"Of the {k} most harmful components, methods find, the cost of their scores included, "
        f"{shares(BUDGETS[0])}; {shares(BUDGETS[-1])}."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Verifications that each method needs, and what it finds within equal budgets."""
    rows = []
    most = table["k"].max()
    for (label, method), part in table.groupby(["label", "method"], sort=False):
        own = part[part["k"] == most]
        row: dict[str, Any] = {
            "task": label,
            "scores": _label(str(method)),
            "passes": f"{own['passes'].mean():.0f}",
            "ρ": _each(own["spearman"], "{:.2f}"),
            "ρ of magnitudes": _each(own["magnitude"], "{:.2f}"),
        }
        for k, of_k in part.groupby("k"):
            row[f"all {k} at"] = _each(of_k.apply(lambda r: _found_at(r)[-1], axis=1))
        row[f"half of {most} at"] = _each(
            own.apply(lambda r: _found_at(r)[(len(_found_at(r)) - 1) // 2], axis=1)
        )
        for budget in BUDGETS:
            found = own.apply(partial(_within, budget=budget), axis=1)
            row[f"found, {budget} passes"] = _each(found)
        rows.append(row)
    return pd.DataFrame(rows)


def _each(values: pd.Series, form: str = "{:.0f}") -> str:
    return " / ".join(form.format(value) for value in values)


_LINES = (
    ("margin", BLUE, "solid"),
    ("mean", SKY, "solid"),
    ("grad_activation", GREY, "dash"),
    ("eap_ig_inputs", GREEN, "solid"),
    ("eap_ig_activations", ORANGE, "solid"),
    ("atp_qk", VERMILION, "dot"),
    ("atp_star", PINK, "solid"),
    ("random", GREY, "dot"),
)


def figure(table: pd.DataFrame) -> go.Figure:
    """Share of the most harmful components found against passes, scores included."""
    most = table[table["k"] == table["k"].max()]
    labels = list(dict.fromkeys(most["label"]))
    figure = make_subplots(
        rows=1, cols=len(labels), shared_yaxes=True, subplot_titles=labels, horizontal_spacing=0.05
    )
    for column, label in enumerate(labels, start=1):
        part = most[most["label"] == label].drop_duplicates("method").set_index("method")
        for method, colour, dash in _LINES:
            if method not in part.index:
                continue
            row = part.loc[method]
            places = _found_at(row)
            figure.add_scatter(
                x=row["passes"] + places,
                y=np.arange(1, len(places) + 1) / len(places),
                mode="lines+markers",
                line={"shape": "hv", "color": colour, "dash": dash, "width": 2},
                marker={"size": 4},
                name=_label(method),
                legendgroup=method,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", dtick=1, title_text="passes, scores included")
    figure.update_yaxes(range=[0, 1.03], tickformat=".0%")
    figure.update_yaxes(title_text=f"found of the {most['k'].iloc[0]} most harmful", col=1)
    figure.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=430,
        legend={"orientation": "h", "y": -0.22, "x": 0.5, "xanchor": "center"},
        margin={"t": 50, "b": 130},
    )
    return figure
