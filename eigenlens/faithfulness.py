"""How true are scores? Their agreement with exact effects, with whole sets, and with themselves.

Curves follow the circuit literature: with ``m(k)`` the metric when a share k of the components is
kept and the others are frozen, ``f(k) = (m(k) − m(∅)) / (m(M) − m(∅))`` is the normalised
faithfulness. CPR is the area under f, CMD the area between f and 1 (MIB, arXiv 2504.13151).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from datasets import Dataset
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.exact import joint_effects
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.metrics import Metric, answer_logits, answer_loss, precise
from eigenlens.scoring import Scores, SingleEffects
from eigenlens.tasks.batches import make_batches

# Shares of the components with the largest |score| where strata end: few of them do most.
STRATA = (0.001, 0.01, 0.1, 0.5, 1.0)


def stratified_sample(
    values: np.ndarray, n: int, *, strata: Sequence[float] = STRATA, seed: int = 0
) -> pd.DataFrame:
    """Rows in equal numbers from strata of ``|values|``.

    Args:
        values: one per component.
        n: how many rows; the last strata give more where the first are too small.
        strata: shares of the components, by falling ``|value|``, where strata end.
        seed: of the draw.

    Returns:
        Columns ``row`` and ``stratum`` (0 holds the largest ``|value|``).

    Raises:
        ValueError: more rows than components, or strata that do not rise to 1.
    """
    if not 1 <= n <= len(values):
        raise ValueError(f"n={n}: draw between 1 and {len(values)} components.")
    if list(strata) != sorted(strata) or strata[-1] != 1 or strata[0] <= 0:
        raise ValueError(f"strata={tuple(strata)} must rise to 1.")
    order = np.argsort(-np.abs(values), kind="stable")
    ends = [round(share * len(values)) for share in strata]
    rng = np.random.default_rng(seed)
    drawn, start, left = [], 0, n
    for stratum, end in enumerate(ends):
        wanted = left // (len(ends) - stratum)
        members = order[start:end]
        size = min(len(members), wanted)
        rows = np.sort(rng.choice(members, size, replace=False)) if size else members[:0]
        drawn.append(pd.DataFrame({"row": rows, "stratum": stratum}))
        start, left = end, left - size
    return pd.concat(drawn, ignore_index=True)


def agreement(
    estimate: np.ndarray,
    exact: np.ndarray,
    strata: np.ndarray | None = None,
    *,
    floor: float = 0.0,
) -> pd.DataFrame:
    """Agreement of estimates with exact effects, over all and by stratum.

    Args:
        estimate: one per component.
        exact: mean exact effects of the same components.
        strata: stratum of each component.
        floor: exact effects up to this size are numerical noise: their sign is not judged.

    Returns:
        Rows ``all`` and each stratum with ``n``, ``pearson``, ``spearman``, ``kendall``, ``sign``
        (share of equal signs) and ``n_sign`` (effects above the floor). NaN where a correlation is
        not defined.
    """
    groups = {"all": np.arange(len(exact))}
    if strata is not None:
        groups |= {str(s): np.flatnonzero(strata == s) for s in np.unique(strata)}
    return pd.DataFrame(
        [
            {"stratum": name, **_agreement(estimate[rows], exact[rows], floor)}
            for name, rows in groups.items()
        ]
    )


def _agreement(estimate: np.ndarray, exact: np.ndarray, floor: float) -> dict[str, Any]:
    defined = len(exact) > 1 and np.ptp(estimate) > 0 and np.ptp(exact) > 0
    measures: dict[str, Callable[..., Any]] = {
        "pearson": scipy.stats.pearsonr,
        "spearman": scipy.stats.spearmanr,
        "kendall": scipy.stats.kendalltau,
    }
    judged = np.abs(exact) > floor
    right = np.sign(estimate[judged]) == np.sign(exact[judged])
    return {
        "n": len(exact),
        **{
            name: float(measure(estimate, exact).statistic) if defined else np.nan
            for name, measure in measures.items()
        },
        "sign": float(right.mean()) if judged.any() else np.nan,
        "n_sign": int(judged.sum()),
    }


def top_k(estimate: np.ndarray, exact: np.ndarray, k: int) -> dict[str, float]:
    """How good the k lowest estimates are as the k lowest exact effects.

    Returns:
        ``recall`` (share of the truly lowest k that are found) and ``regret`` (summed exact effect
        of what was chosen, less that of the truly lowest k: nats lost, never negative).

    Raises:
        ValueError: k out of range.
    """
    if not 1 <= k <= len(exact):
        raise ValueError(f"k={k}: choose from 1 to {len(exact)}.")
    chosen = np.argsort(estimate, kind="stable")[:k]
    best = np.argsort(exact, kind="stable")[:k]
    return {
        "recall": len(np.intersect1d(chosen, best)) / k,
        "regret": float(exact[chosen].sum() - exact[best].sum()),
    }


def set_effects(
    model: TransformerBridge,
    scores: Scores,
    sets: Mapping[str, FrozenSet],
    data: Dataset,
    *,
    batch_size: int = 50,
) -> pd.DataFrame:
    """Predicted against real change of the loss when whole sets are frozen.

    The prediction is the sum of scores, each times its strength. Columns ``set, components,
    predicted, real`` in nats.

    Raises:
        ValueError: a set with components that were not scored.
    """
    keys = ["layer", "matrix", "head", "index"]
    known = scores.components[keys].assign(delta_loss=scores.delta_loss)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": False}
    real = joint_effects(model, list(sets.values()), data, **options).mean(1)
    rows = []
    for (name, frozen), effect in zip(sets.items(), real, strict=True):
        listed = frozen.to_pandas().merge(known, on=keys, how="left")
        if unknown := int(listed["delta_loss"].isna().sum()):
            raise ValueError(f"{name}: {unknown} of {len(frozen)} components have no score.")
        predicted = float((listed["delta_loss"] * listed["strength"]).sum())
        sizes = {"components": len(frozen), "predicted": predicted, "real": float(effect)}
        rows.append({"set": name, **sizes})
    return pd.DataFrame(rows)


def faithfulness_curve(
    model: TransformerBridge,
    scores: Scores,
    data: Dataset,
    *,
    values: np.ndarray | None = None,
    kept: Sequence[float] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    metric: Metric = answer_loss,
    batch_size: int = 50,
) -> pd.DataFrame:
    """Normalised faithfulness when only a share of the components is kept.

    Components with the highest values are kept (freezing them would cost most), the others frozen.

    Args:
        model: in eval mode, unedited.
        scores: of the model.
        data: examples to measure on.
        values: ranks the components instead of ``scores.delta_loss``.
        kept: shares to keep; 0 and 1 are added.
        metric: a number per example, averaged.
        batch_size: examples per pass.

    Returns:
        Columns ``kept``, ``metric`` and ``faithfulness``.

    Raises:
        ValueError: a share outside [0, 1]; nothing kept and all kept give the same metric.
    """
    if min(kept, default=0) < 0 or max(kept, default=1) > 1:
        raise ValueError(f"kept={tuple(kept)}: shares lie in [0, 1].")
    order = np.argsort(scores.delta_loss if values is None else values, kind="stable")
    n_frozen = [len(order) - round(share * len(order)) for share in kept]
    sets = [FrozenSet.from_scores(scores, np.sort(order[:n])) for n in n_frozen]
    return faithfulness_of(model, scores, sets, data, metric=metric, batch_size=batch_size)


def faithfulness_of(
    model: TransformerBridge,
    scores: Scores,
    sets: Sequence[FrozenSet],
    data: Dataset,
    *,
    metric: Metric = answer_loss,
    batch_size: int = 50,
) -> pd.DataFrame:
    """Normalised faithfulness of what each set does not freeze, from the least to the most kept.

    Args:
        model: in eval mode, unedited.
        scores: of the model, with all components.
        sets: components to freeze; none and all are added.
        data: examples to measure on.
        metric: a number per example, averaged.
        batch_size: examples per pass.

    Returns:
        Columns ``kept`` (share of the components), ``metric`` and ``faithfulness``.

    Raises:
        ValueError: nothing kept and all kept give the same metric.
    """
    n = len(scores)
    by_size = {size: FrozenSet.from_scores(scores, np.arange(size)) for size in (0, n)}
    ordered = [by_size[n], *(s for s in sets if 0 < len(s) < n), by_size[0]]
    ordered.sort(key=len, reverse=True)
    batches = make_batches(data, model, batch_size)
    measured = []
    for frozen in ordered:
        with torch.no_grad(), freeze(model, frozen):
            sums = [metric(precise(answer_logits(model, b)), b).sum() for b in batches]
        measured.append(float(torch.stack(sums).sum()) / len(data))
    span = measured[-1] - measured[0]
    if span == 0:
        raise ValueError("Keeping nothing and keeping all give the same metric.")
    return pd.DataFrame(
        {
            "kept": [(n - len(frozen)) / n for frozen in ordered],
            "metric": measured,
            "faithfulness": [(value - measured[0]) / span for value in measured],
        }
    )


def curve_areas(curve: pd.DataFrame) -> dict[str, float]:
    """CPR (area under the faithfulness curve) and CMD (area between it and 1), by trapezoids."""
    k, f = curve["kept"].to_numpy(), curve["faithfulness"].to_numpy()
    return {"cpr": float(np.trapezoid(f, k)), "cmd": float(np.trapezoid(np.abs(1 - f), k))}


def bootstrap_scores(
    single: SingleEffects, *, n_resamples: int = 10, seed: int = 0
) -> Float[np.ndarray, "resample component"]:
    """Scores on resamples of the examples (with replacement), without running the model.

    Means, which take the place of coordinates, stay those of all examples.

    Args:
        single: effects on single examples (:func:`eigenlens.scoring.single_effects`).
        n_resamples: how many resamples.
        seed: of the draw.

    Raises:
        ValueError: a criterion that does not follow from effects on single examples (``max``).
    """
    rng = np.random.default_rng(seed)
    n = len(single.metric)
    criterion = single.scores.criterion
    return np.stack(
        [
            single.weighted(rng.multinomial(n, np.full(n, 1 / n)).astype(float))
            .with_criterion(criterion)
            .delta_loss
            for _ in range(n_resamples)
        ]
    )


def stability(resampled: Float[np.ndarray, "resample component"], count: int) -> dict[str, float]:
    """Mean pairwise agreement of scores, and of the ``count`` components that each would select.

    Raises:
        ValueError: fewer than two resamples.
    """
    if len(resampled) < 2:
        raise ValueError("Stability needs two resamples at least.")
    chosen = [set(np.argsort(values, kind="stable")[:count]) for values in resampled]
    pairs = list(combinations(range(len(resampled)), 2))
    spearman = [scipy.stats.spearmanr(resampled[i], resampled[j]).statistic for i, j in pairs]
    jaccard = [len(chosen[i] & chosen[j]) / len(chosen[i] | chosen[j]) for i, j in pairs]
    return {"spearman": float(np.mean(spearman)), "jaccard": float(np.mean(jaccard))}
