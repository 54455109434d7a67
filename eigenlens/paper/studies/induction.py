"""Do scores find the heads that are known to carry copying in context?

The published finding: *induction heads*, which look at what followed an earlier occurrence of the
token at hand, carry copying in context, and it goes when they are taken out (Olsson et al. 2022,
arXiv 2209.11895). Heads are found twice, without one way knowing of the other: by where they look
(:func:`transformer_lens.head_detector.detect_head`), and by the scores of what they write, the sum
over the components of W_O of a head. Then the best of either ranking, and random ones, are frozen.
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
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.decomposition import decompose
from eigenlens.evaluation import evaluate
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.paper.studies.by_split import Measurement, Split, study_by_split
from eigenlens.paper.studies.config import TasksConfig
from eigenlens.plots.style import BLUE, FULL_WIDTH, GREY, TEMPLATE, VERMILION
from eigenlens.scoring import Scores, score
from eigenlens.tasks import Task

QUESTION = "Do scores find the heads that are known to carry copying in context?"
MINUTES = 15
_NONE = "none"
_MEASURES = ("score", "attention")
_RANKINGS = {"score": "by score", "attention": "by where they look", "random": "random"}
_COLOURS = {"score": BLUE, "attention": VERMILION, "random": GREY}
_TOP = 10  # heads of each ranking that are compared


class InductionStudyConfig(TasksConfig):
    """What the study runs.

    Attributes:
        k: how many heads are frozen together.
        draws: of random heads.
    """

    k: tuple[int, ...] = Field(default=(1, 2, 4, 8, 16), min_length=1)
    draws: int = Field(default=5, ge=1)


def _measurements(split: Split, config: InductionStudyConfig) -> Iterator[Measurement]:
    options = config.model_dump(include={"k", "draws"})
    options |= {"batch_size": split.setting.batch_size}
    yield Measurement(partial(_measure, split, config), options)


run = study_by_split(__name__, InductionStudyConfig, _measurements, {"random draws": "draws"})


def _measure(split: Split, config: InductionStudyConfig) -> list[dict[str, Any]]:
    """A row per head, and one per set of heads that was frozen."""
    model, task = split.loaded, split.task
    options: dict[str, Any] = {"batch_size": split.setting.batch_size, "progress": False}
    spectra = decompose(model, ["W_O"], progress=False)
    scores = score(model, spectra, task.train, criterion="mean", reference="shared", **options)
    heads = of_heads(scores).assign(attention=attention_to_what_followed(model, task))
    rows: list[dict[str, Any]] = [
        {
            "what": "head",
            "layer": h.layer,
            "head": h.head,
            "score": h.score,
            "attention": h.attention,
        }
        for h in heads.itertuples()
    ]
    for by, k, draw, chosen in _sets(heads, split.seed, config):
        with freeze(model, heads_frozen(scores, chosen)):
            found = evaluate(model, task.test, choices=False, **options)
        told = {"what": "frozen", "by": by, "k": k, "draw": draw}
        rows.append({**told, "loss": found.loss, "accuracy": found.accuracy})
    return rows


def _sets(
    heads: pd.DataFrame, seed: int, config: InductionStudyConfig
) -> Iterator[tuple[str, int, int, pd.DataFrame]]:
    """None, and the first k heads of every ranking: what ranked them, k, the draw, and they."""
    yield _NONE, 0, 0, heads.head(0)
    ranked = [(by, 0, heads.sort_values(by, ascending=False, kind="stable")) for by in _MEASURES]
    for draw in range(config.draws):
        rng = np.random.default_rng([seed, draw])
        ranked.append(("random", draw, heads.iloc[rng.permutation(len(heads))]))
    for by, draw, order in ranked:
        for k in config.k:
            yield by, k, draw, order.head(k)


def of_heads(scores: Scores) -> pd.DataFrame:
    """The score of every head: to first order, the effect of freezing all that it writes.

    Columns ``layer, head, score``, in nats of the task's loss; layers one after the other.
    """
    found = scores.components.assign(score=scores.delta_loss)
    return found.groupby(["layer", "head"])[["score"]].sum().reset_index()


def heads_frozen(scores: Scores, heads: pd.DataFrame) -> FrozenSet:
    """All components of ``scores`` that belong to these heads, frozen."""
    chosen = pd.MultiIndex.from_frame(heads[["layer", "head"]])
    every = pd.MultiIndex.from_frame(scores.components[["layer", "head"]])
    return FrozenSet.from_scores(scores, np.flatnonzero(every.isin(chosen)))


def attention_to_what_followed(model: TransformerBridge, task: Task) -> np.ndarray:
    """Share of each head's attention that goes to what followed an earlier such token."""
    found = detect_head(model, list(task.train["prompt"]), "induction_head")
    return found.double().cpu().numpy().ravel()


def text(table: pd.DataFrame) -> str:
    """What was found, and how it was measured."""
    parts = dict(list(table.groupby("model", sort=False)))
    shows = {str(model): _shows(part) for model, part in parts.items()}
    verdicts = [
        f"{said} in {', '.join(models)}"
        for said, models in (
            (
                "losing the heads that either ranking finds costs more than losing any random ones",
                [model for model, more in shows.items() if more],
            ),
            (
                "losing some random heads costs as much",
                [model for model, more in shows.items() if not more],
            ),
        )
        if models
    ]
    found = "; ".join(_finding(str(model), part) for model, part in parts.items())
    return (
        f"Where words are copied, {', and '.join(verdicts)}. {found}. A list of sixteen random "
        "words comes two and a half times, and the word that follows is asked for. Heads are "
        "ranked by where they look on training prompts (share of attention on what followed an "
        "earlier occurrence of the token), and by the sum of the scores of the components that "
        "they write (attribution patching, under one mean for all positions): neither knows of "
        "the other. Freezing a head puts the mean in place of all that it writes. Losses are in "
        "nats, of test prompts, and means over splits; of random heads, the lowest to the highest "
        "of all draws. The figure shows every head of the first split, and every split at the "
        "right, random heads as the mean of their draws. The finding is that of Olsson et al. 2022 "
        "(arXiv 2209.11895): heads that look at what followed an earlier occurrence carry copying "
        "in context."
    )


def _shows(table: pd.DataFrame) -> bool:
    """Whether in every split and at every k the loss is highest without the heads of a ranking."""
    frozen = table[table["k"] > 0]
    loss = frozen.groupby(["seed", "k", "by"])["loss"]
    highest, lowest = loss.max().unstack("by"), loss.min().unstack("by")
    return bool((lowest[list(_MEASURES)].min(axis=1) > highest["random"]).all())


def _finding(model: str, table: pd.DataFrame) -> str:
    heads, frozen = table[table["what"] == "head"], table[table["what"] == "frozen"]
    n_heads = len(heads) // heads["seed"].nunique()
    both = np.mean([len(_in_common(part)) for _, part in heads.groupby("seed")])
    k = int(frozen["k"].max() if 8 not in set(frozen["k"]) else 8)
    without = frozen[frozen["k"] == k]
    named = ", ".join(f"{_told(without, by)} {name}" for by, name in _RANKINGS.items())
    before = frozen.loc[frozen["by"] == _NONE, "loss"].mean()
    return (
        f"{model}: of the {_TOP} heads with the highest scores {both:.1f} are among the {_TOP} "
        f"that look most at what followed ({_TOP**2 / n_heads:.1f} by chance); without {k} of "
        f"{n_heads} heads, the loss of {before:.2f} becomes {named}"
    )


def _told(frozen: pd.DataFrame, by: str) -> str:
    """The loss without these heads: the mean over splits, and the range of random ones."""
    loss = frozen.loc[frozen["by"] == by, "loss"]
    return f"{loss.min():.2f} to {loss.max():.2f}" if by == "random" else f"{loss.mean():.2f}"


def _in_common(heads: pd.DataFrame) -> pd.DataFrame:
    """The heads that are among the best of both rankings, the highest score first."""
    score, attention = (heads.nlargest(_TOP, by) for by in _MEASURES)
    return score[score.index.isin(attention.index)]


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Agreement of the two rankings, and the loss without the best of either."""
    rows = []
    for (model, seed), part in table.groupby(["model", "seed"], sort=False):
        heads, frozen = part[part["what"] == "head"], part[part["what"] == "frozen"]
        rho = scipy.stats.spearmanr(heads["score"], heads["attention"]).statistic
        row: dict[str, Any] = {
            "model": model,
            "split": seed,
            "heads": len(heads),
            "ρ": f"{rho:.2f}",
            f"among the {_TOP} best of both": ", ".join(
                f"L{h.layer:.0f}H{h.head:.0f}" for h in _in_common(heads).itertuples()
            ),
            "loss before": _told(frozen, _NONE),
        }
        for k in sorted(set(frozen["k"]) - {0}):
            row[f"without {k:.0f}: by score / look / random"] = " / ".join(
                _told(frozen[frozen["k"] == k], by) for by in _RANKINGS
            )
        rows.append(row)
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> go.Figure:
    """Every head by both measures, and the loss over how many of the best are frozen."""
    models = list(dict.fromkeys(table["model"]))
    drawn = make_subplots(
        rows=len(models), cols=2, horizontal_spacing=0.14, vertical_spacing=0.25 / len(models)
    )
    for row, model in enumerate(models, start=1):
        part = table[table["model"] == model]
        _heads(drawn, part[(part["what"] == "head") & (part["seed"] == part["seed"].min())], row)
        _losses(drawn, part[part["what"] == "frozen"], row)
        drawn.update_yaxes(title_text=f"{model}<br>score of a head (nats)", row=row, col=1)
        drawn.update_yaxes(title_text="loss (nats)", row=row, col=2)
    drawn.update_xaxes(title_text="attention on what followed", tickformat=".0%", col=1)
    drawn.update_xaxes(title_text="heads frozen", col=2)
    drawn.update_layout(
        template=TEMPLATE,
        width=FULL_WIDTH,
        height=130 + 260 * len(models),
        legend={
            "orientation": "h",
            "y": -75 / (260 * len(models)),
            "yanchor": "top",
            "x": 0.5,
            "xanchor": "center",
        },
        margin={"t": 20, "b": 110},
    )
    return drawn


def _heads(drawn: go.Figure, heads: pd.DataFrame, row: int) -> None:
    drawn.add_scatter(
        x=heads["attention"],
        y=heads["score"],
        mode="markers",
        marker={"color": GREY, "size": 6, "opacity": 0.7},
        showlegend=False,
        customdata=heads[["layer", "head"]],
        hovertemplate="L%{customdata[0]}H%{customdata[1]}<extra></extra>",
        row=row,
        col=1,
    )


def _losses(drawn: go.Figure, frozen: pd.DataFrame, row: int) -> None:
    before = frozen.loc[frozen["k"] == 0, ["seed", "loss"]]
    for by, name in _RANKINGS.items():
        own = frozen[(frozen["by"] == by) & (frozen["k"] > 0)]
        own = own.groupby(["seed", "k"])[["loss"]].mean().reset_index()
        for i, (seed, line) in enumerate(own.groupby("seed")):
            start = before.loc[before["seed"] == seed, "loss"].iloc[0]
            drawn.add_scatter(
                x=[0, *line["k"]],
                y=[start, *line["loss"]],
                mode="lines+markers",
                line={"color": _COLOURS[by], "width": 1.5},
                marker={"size": 5},
                name=name,
                legendgroup=by,
                showlegend=row == 1 and i == 0,
                row=row,
                col=2,
            )
