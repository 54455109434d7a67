"""A model whose circuit is known, for whoever looks for circuits to be held against.

1. One head of every layer is cut off: its output is taken out of the weights (W_O). What it still
   computes from queries, keys and values goes nowhere, at singular values as large as any.
2. Of what is left, a part that does the task is looked for (by ``learned(keep=True)``), and every
   other component is taken out of the weights.

The circuit is what then has a singular value above zero and is not of a head that was cut off; all
else changes nothing, whatever it is replaced by. A coordinate that is taken out is one frozen at
zero input, so both the construction and the search here are under the reference ``zero``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.svf import SpectralEdit
from eigenlens.decomposition import decompose
from eigenlens.frozen_set import FrozenSet
from eigenlens.scoring import Scores, score
from eigenlens.search import LearnedConfig, learned
from eigenlens.spectra import COMPONENT, Spectra
from eigenlens.tasks import Task

_PRICE = 3.0  # of keeping all components, in nats, for the construction and for the search
_NO_PART = 1e-4  # of the largest singular value: below, a component was taken out


def find_known_circuit(
    model: TransformerBridge,
    task: Task,
    batch_size: int,
    rankings: Callable[[Scores], Mapping[str, np.ndarray]],
) -> list[dict[str, Any]]:
    """Plant a circuit, and look for it by ``learned(keep=True)`` and by rankings.

    Args:
        model: unedited, with heads of their own for keys and values; it is left as it was.
        task: of the circuit.
        batch_size: examples per pass.
        rankings: from scores, by name; as many components as the circuit has are kept, those of
            the highest values.

    Returns:
        A row for each: ``ranking, precision, recall, circuit`` (its size) and ``chosen`` (how many
        are kept).
    """
    spectra = decompose(model, progress=False)
    idle = idle_components(spectra.components)
    cut = idle & (spectra.components["matrix"] == "W_O").to_numpy()
    with only(spectra, ~cut).applied(model):
        part = _mask(*_kept(model, task, batch_size))
    with only(spectra, np.where(idle, ~cut, part)).applied(model):
        scores, frozen = _kept(model, task, batch_size)
    circuit = circuit_of(scores.components)
    chosen = {"learned to keep": _mask(scores, frozen)}
    for name, values in rankings(scores).items():
        highest = np.argsort(-values, kind="stable")[: circuit.sum()]
        chosen[name] = np.isin(np.arange(len(scores)), highest)
    return [{"ranking": name, **_agreement(kept, circuit)} for name, kept in chosen.items()]


def idle_components(components: pd.DataFrame) -> Bool[np.ndarray, " component"]:
    """Those of the heads that are cut off, a different one in every layer."""
    attention = components[components["matrix"].isin(["W_Q", "W_K", "W_V", "W_O"])]
    n_heads = attention["head"].max() + 1
    of_head = components["head"] == (components["layer"] + 1) % n_heads
    return (components.index.isin(attention.index) & of_head).to_numpy()


def circuit_of(components: pd.DataFrame) -> Bool[np.ndarray, " component"]:
    """What is left of a model from which all else was taken out."""
    sigma = components["sigma"].to_numpy()
    return (sigma > _NO_PART * sigma.max()) & ~idle_components(components)


def only(spectra: Spectra, kept: Bool[np.ndarray, " component"]) -> SpectralEdit:
    """The edit that takes all other components out of the weights."""
    factors = torch.tensor(kept, dtype=torch.float32).split(spectra.sizes)
    shaped = {
        name: part.view(spectra[name].site.n_heads, -1)
        for name, part in zip(spectra, factors, strict=True)
    }
    return SpectralEdit(shaped, spectra=spectra)


def _kept(model: TransformerBridge, task: Task, batch_size: int) -> tuple[Scores, FrozenSet]:
    options: dict[str, Any] = {"criterion": "margin", "reference": "zero", "progress": False}
    spectra = decompose(model, progress=False)
    scores = score(model, spectra, task.train, batch_size=batch_size, **options)
    config = LearnedConfig(sparsity=_PRICE, batch_size=batch_size)
    data = (task.train, task.validation)
    return scores, learned(model, scores, *data, config, keep=True, progress=False).frozen


def _mask(scores: Scores, frozen: FrozenSet) -> Bool[np.ndarray, " component"]:
    """Which components of ``scores`` are kept."""
    mine = pd.MultiIndex.from_frame(frozen.components[COMPONENT])
    return ~pd.MultiIndex.from_frame(scores.components[COMPONENT]).isin(mine)


def _agreement(kept: np.ndarray, circuit: np.ndarray) -> dict[str, Any]:
    right = int((kept & circuit).sum())
    return {
        "precision": right / max(1, int(kept.sum())),
        "recall": right / int(circuit.sum()),
        "circuit": int(circuit.sum()),
        "chosen": int(kept.sum()),
    }
