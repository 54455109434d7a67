"""Do scores find damage that was put there on purpose?

A rank-1 path ``s · u vᵀ`` with known directions is added to one weight matrix of a model. Its
component in the decomposition of the damaged matrix is the planted one. A good score ranks it below
all others: the AUROC is the share of the other components of the model that score higher, and the
rank is its place from below (1 is best). ``u`` is drawn from the inputs that the matrix really sees
(a random combination of calibration inputs, centred), ``v`` at random; the strength is set so that
the path raises the loss by a given amount, found by bisection.

Placements that cannot do the damage at any strength (a torn attention pattern may not matter), or
whose exact effect is not above the noise of its measurement, say nothing and are counted apart.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from datasets import Dataset
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens import bases
from eigenlens.decomposition import decompose, working_dtype
from eigenlens.evaluation import evaluate
from eigenlens.far_side import input_vectors, output_vectors, unit
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import Site, WeightMatrix, weight_matrices
from eigenlens.models import load_model
from eigenlens.paper.studies.result import ExperimentResult
from eigenlens.passes import Activation, FiniteCheck, record
from eigenlens.plots.style import BLUE, FULL_WIDTH, SKY, TEMPLATE, VERMILION
from eigenlens.provenance import Provenance
from eigenlens.scoring import Scores, score
from eigenlens.spectra import Spectra, Spectrum
from eigenlens.tasks import Batch, Task, load_task, make_batches
from eigenlens.weights import restored

QUESTION = "Do scores find damage that was planted on purpose?"
MINUTES = 8
STRENGTHS = (0.01, 0.1, 1.0)  # nats of damage that are aimed at
_COLOURS, _SYMBOLS = (SKY, BLUE, VERMILION), ("circle", "square", "diamond")


@dataclass(frozen=True)
class Setting:
    """One model and task of the experiment."""

    model: str
    task: str
    arguments: dict[str, Any]
    placements: int
    batch_size: int
    layers: tuple[int, ...] | None = None


SETTINGS = {
    "arith-tiny": Setting("arith-tiny", "int_add", {"high": 20, "n_train": 200}, 6, 200),
    "smollm2-135m": Setting(
        "smollm2-135m", "int_add", {"high": 10, "n_train": 40}, 1, 40, layers=(4, 24)
    ),
}


def run(models: tuple[str, ...] = tuple(SETTINGS), seed: int = 0) -> ExperimentResult:
    """Run the experiment on these models of :data:`SETTINGS`."""
    table = pd.concat([_one_model(SETTINGS[name], seed) for name in models], ignore_index=True)
    return _result(table, models, seed)


def _result(table: pd.DataFrame, models: tuple[str, ...], seed: int) -> ExperimentResult:
    return ExperimentResult(
        name="planted",
        table=table,
        summary=summary(table),
        figure=figure(table),
        settings={"models": models, "seed": seed, "strengths": STRENGTHS},
        text=text(table),
    )


def _untested(table: pd.DataFrame) -> str:
    kinds = []
    for model in dict.fromkeys(table["model"]):
        for matrix in dict.fromkeys(table.loc[table["model"] == model, "matrix"]):
            mine = (table["model"] == model) & (table["matrix"] == matrix)
            if not table.loc[mine, "above_noise"].any():
                kinds.append(f"{matrix} of {model}")
    return ", ".join(kinds) or "none"


def _one_model(setting: Setting, seed: int) -> pd.DataFrame:
    model = load_model(setting.model, device="cpu")
    task = load_task(setting.task, model.tokenizer, seed=seed, **setting.arguments)
    rng = np.random.default_rng(seed)
    clean = decompose(model, layers=setting.layers, progress=False)
    maps = weight_matrices(model, layers=setting.layers)
    places = [matrix for matrix in maps for _ in range(setting.placements)]
    rows = []
    for matrix in tqdm(places, desc=f"planted, {setting.model}"):
        head = int(rng.integers(matrix.n_heads))
        u, v = _directions(model, matrix, head, task.train, rng, setting.batch_size)
        for aim in STRENGTHS:
            found = _plant_and_score(model, clean, matrix, head, u, v, aim, task, setting)
            common = {"model": setting.model, "matrix": matrix.kind, "layer": matrix.layer}
            rows += [{**common, "aim": aim, **row} for row in found]
    return pd.DataFrame(rows)


def _directions(
    model: TransformerBridge,
    matrix: WeightMatrix,
    head: int,
    data: Dataset,
    rng: np.random.Generator,
    batch_size: int,
) -> tuple[Float[Tensor, " d_in"], Float[Tensor, " d_out"]]:
    """A random mix of the centred inputs that the matrix sees, and a random direction to write."""
    seen: list[Tensor] = []
    finite = FiniteCheck()
    site = matrix.site_on("in")
    own = head if site.n_heads > 1 else 0
    for batch in make_batches(data, model, batch_size):

        def keep(site: Site, x: Activation, batch: Batch = batch) -> None:
            x = x[:, :, own].to(working_dtype(matrix))
            seen.append((x - x.mean(0))[batch.attention_mask])

        record(model, [site], batch, keep, finite)
    finite.check()
    inputs = torch.cat(seen)
    mix = torch.tensor(rng.normal(size=len(inputs)), dtype=inputs.dtype)
    v = torch.tensor(rng.normal(size=matrix.d_out), dtype=inputs.dtype)
    u = mix @ inputs
    return u / u.norm(), v / v.norm()


@contextmanager
def planted(matrix: WeightMatrix, head: int, path: Float[Tensor, "d_in d_out"]) -> Iterator[None]:
    """Add ``path`` to one head of a weight inside the block; restored exactly afterwards."""
    with restored([matrix.flat_weight]):
        with torch.no_grad():
            matrix.weight[head] += path
        yield


def _plant_and_score(
    model: TransformerBridge,
    clean: Spectra,
    matrix: WeightMatrix,
    head: int,
    u: Tensor,
    v: Tensor,
    aim: float,
    task: Task,
    setting: Setting,
) -> list[dict[str, Any]]:
    path = torch.outer(u, v)
    base = evaluate(model, task.train, batch_size=setting.batch_size, progress=False).loss
    strength, reached = _strength(
        model, matrix, head, path, base + aim, task.train, setting.batch_size
    )
    with planted(matrix, head, strength * path):
        spectra = _redecomposed(model, clean, matrix)
        options: dict[str, Any] = {"batch_size": setting.batch_size, "progress": False}
        scores = score(model, spectra, task.train, criterion="max", **options)
        options |= {"criterion": "max_everywhere", "reference": "resample"}
        released = score(model, spectra, task.train, **options)
        row = _planted_row(model, scores, spectra[matrix.name], head, u, v)
        effect, error = _exact(model, scores, row, task.train, setting.batch_size)
    values = {
        "margin": scores.with_criterion("margin").delta_loss,
        "fisher": scores.with_criterion("fisher").delta_loss,
        "first order (mean)": scores.with_criterion("mean").delta_loss,
        "ucb": scores.with_criterion("ucb").delta_loss,
        "max": scores.delta_loss,
        "released code": released.delta_loss,
        "σ (largest)": -scores.components["sigma"].to_numpy(),
    }
    common = {
        "strength": strength,
        "exact": effect,
        "exact_stderr": error,
        "reached": reached,
        "above_noise": reached and effect < -3 * error,
    }
    return [{"method": name, **common, **_place(value, row)} for name, value in values.items()]


def _strength(
    model: TransformerBridge,
    matrix: WeightMatrix,
    head: int,
    path: Tensor,
    target: float,
    data: Dataset,
    batch_size: int,
) -> tuple[float, bool]:
    """Strength that brings the loss to ``target``, within a factor of 1.2, and whether any does.

    Paths up to 100 times the weight's norm are tried.
    """

    def damaged(strength: float) -> bool:
        with planted(matrix, head, strength * path):
            return evaluate(model, data, batch_size=batch_size, progress=False).loss >= target

    scale = float(matrix.weight[head].norm())
    high = scale / 1000
    while not damaged(high) and high < 100 * scale:
        high *= 4
    low = high / 4
    while high > 1.2 * low:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if damaged(middle) else (middle, high)
    return high, damaged(high)


def _redecomposed(model: TransformerBridge, clean: Spectra, matrix: WeightMatrix) -> Spectra:
    """The clean decomposition with that of the one damaged matrix exchanged."""
    damaged = bases.svd(matrix, clean[matrix.name].dtype)
    mixed = [damaged if name == matrix.name else clean[name] for name in clean]
    return Spectra(mixed, Provenance.of(model))


def _planted_row(
    model: TransformerBridge, scores: Scores, spectrum: Spectrum, head: int, u: Tensor, v: Tensor
) -> int:
    """Row of the component that is most like the planted path."""
    reads = unit(input_vectors(model, spectrum)[head].mT)
    writes = unit(output_vectors(model, spectrum)[head])
    overlap = (reads @ u).abs() * (writes @ v).abs()
    c = scores.components
    mine = (
        (c["layer"] == spectrum.site.layer)
        & (c["matrix"] == spectrum.site.kind)
        & (c["head"] == head)
        & (c["index"] == int(overlap.argmax()))
    )
    return int(np.flatnonzero(mine)[0])


def _exact(
    model: TransformerBridge, scores: Scores, row: int, data: Dataset, batch_size: int
) -> tuple[float, float]:
    """What freezing really does to the loss, and the standard error over examples."""
    before = evaluate(model, data, batch_size=batch_size, progress=False).examples["loss"]
    with freeze(model, FrozenSet.from_scores(scores, np.array([row]))):
        change = (
            evaluate(model, data, batch_size=batch_size, progress=False).examples["loss"] - before
        )
    return float(change.mean()), float(change.std() / len(change) ** 0.5)


def _place(values: np.ndarray, row: int) -> dict[str, Any]:
    others = np.delete(values, row)
    below, tied = int((others < values[row]).sum()), int((others == values[row]).sum())
    return {"auroc": 1 - (below + tied / 2) / len(others), "rank": below + 1}


def text(table: pd.DataFrame) -> str:
    """What the page says about the table."""
    return (
        "A rank-1 path of known directions was added to one matrix at a time, strong enough to "
        "raise the task's loss by about 0.01, 0.1 or 1 nat. AUROC is the share of all other "
        "components that score higher than the planted one (mean over placements), rank its "
        "median place from below. Placements that could not do the damage at any strength, or "
        "whose exact effect was not above three standard errors, are left out of the AUROC and "
        "counted under `no damage` and `in noise` (rows where none is left are not shown). "
        "`margin` is the default estimator; `released code` scores as the paper's released "
        "code does: reference from another example of the batch, largest effect over batch and "
        "positions, identical first positions included. A path strong enough to do damage is "
        "also among the largest singular values, so σ alone finds it: this tests whether the "
        "scores see what is harmful, not whether they are needed to find something unusual. "
        f"Kinds without any placement left, and so untested: {_untested(table)}."
    )


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """AUROC of the planted component by model, damage and method."""
    rows = []
    for (model, aim, method), part in table.groupby(["model", "aim", "method"], sort=False):
        seen = part[part["above_noise"]]
        if seen.empty:
            continue
        rows.append(
            {
                "model": model,
                "damage (nats)": aim,
                "scored by": method,
                "AUROC": round(float(seen["auroc"].mean()), 4),
                "lowest AUROC": round(float(seen["auroc"].min()), 4),
                "median rank": float(seen["rank"].median()),
                "placements": len(seen),
                "in noise": int((part["reached"] & ~part["above_noise"]).sum()),
                "no damage": int((~part["reached"]).sum()),
            }
        )
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> go.Figure:
    """AUROC of the planted component by method; a method without a placement left has no mark."""
    models = list(dict.fromkeys(table["model"]))
    methods = list(dict.fromkeys(table["method"]))
    figure = make_subplots(rows=1, cols=len(models), subplot_titles=models, shared_yaxes=True)
    seen = table[table["above_noise"]]
    for column, model in enumerate(models, start=1):
        for aim, colour, symbol in zip(STRENGTHS, _COLOURS, _SYMBOLS, strict=True):
            part = seen[(seen["model"] == model) & (seen["aim"] == aim)]
            grouped = part.groupby("method")["auroc"]
            error = grouped.std() / grouped.count() ** 0.5
            figure.add_trace(
                go.Scatter(
                    x=grouped.mean().reindex(methods),
                    y=methods,
                    orientation="h",
                    mode="markers",
                    error_x={"array": error.reindex(methods), "thickness": 1.5, "width": 4},
                    marker={"color": colour, "symbol": symbol, "size": 10},
                    name=f"{aim:g} nat{'' if aim == 1 else 's'} of damage",
                    legendgroup=str(aim),
                    showlegend=column == 1,
                ),
                row=1,
                col=column,
            )
    figure.update_xaxes(range=[-0.05, 1.05], title_text="AUROC of the planted component (± SE)")
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title_text="scored by", col=1)
    figure.update_layout(
        template=TEMPLATE,
        scattermode="group",
        scattergap=0.35,
        width=FULL_WIDTH,
        height=470,
        legend={"orientation": "h", "y": -0.2, "x": 0.5, "xanchor": "center"},
        margin={"t": 50, "b": 110, "l": 150},
    )
    return figure
