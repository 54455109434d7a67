"""Exact effects: really freeze, really measure. The judge of all estimators.

Many single components share a forward pass: the blocks below a layer run once for a batch, whose
rows are then repeated, and in every copy another component of that layer is frozen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.copies import MOST_ROWS, CopyEdit, tiled, tiled_beside
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.inputs import check_data
from eigenlens.memory import fitting
from eigenlens.metrics import Metric, answer_logits, answer_loss, check_eval_mode, precise
from eigenlens.passes import FiniteCheck, activations
from eigenlens.provenance import keeping_weights
from eigenlens.scoring import Scores
from eigenlens.spectra import Spectra, Spectrum
from eigenlens.tasks.batches import Batch, make_batches
from eigenlens.tasks.pairs import paired


def exact_effects(
    model: TransformerBridge,
    scores: Scores,
    rows: np.ndarray,
    data: Dataset,
    *,
    strength: float = 1.0,
    metric: Metric = answer_loss,
    batch_size: int = 50,
    progress: bool = True,
) -> Float[np.ndarray, "component example"]:
    """Change of the metric of every example when one component is really frozen.

    Cost: for a component of layer l of L, the share ``(L − l) / L`` of a forward pass.

    Args:
        model: in eval mode, unedited.
        scores: give directions and the means that replace activations; with the reference ``pair``
            the counterparts' activations replace them instead.
        rows: of ``scores.components``, one component each.
        data: examples to measure on.
        strength: 1 freezes, less attenuates.
        metric: a number per example; the loss in nats by default.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: a model in training mode; scores without directions; ``pair`` with data that
            have no counterparts.
    """
    check_eval_mode(model)
    spectra = scores.spectra_on(model)
    check_data(data)
    run = partial(_exact, model, scores, spectra, np.asarray(rows), data, strength, metric)
    most = max(MOST_ROWS, batch_size)
    return fitting(model, "exact", most, lambda size: run(batch_size, size, progress))


@keeping_weights
def joint_effects(
    model: TransformerBridge,
    sets: Sequence[FrozenSet],
    data: Dataset,
    *,
    metric: Metric = answer_loss,
    batch_size: int = 50,
    progress: bool = True,
) -> Float[np.ndarray, "set example"]:
    """Change of the metric of every example when a whole set of components is really frozen.

    Cost: a forward pass of ``data`` for each set, and one of the unedited model.

    Args:
        model: in eval mode, unedited.
        sets: edits, one at a time.
        data: examples to measure on.
        metric: a number per example; the loss in nats by default.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: a model in training mode; a set of other weights.
    """
    check_eval_mode(model)
    check_data(data)

    def passes(size: int) -> Float[np.ndarray, "set example"]:
        effects = np.empty((len(sets), len(data)))
        batches = make_batches(data, model, size)
        base = [_measured(model, batch, metric) for batch in batches]
        for number, frozen in enumerate(tqdm(sets, desc="joint", disable=not progress)):
            with freeze(model, frozen):
                for batch, before in zip(batches, base, strict=True):
                    change = _measured(model, batch, metric) - before
                    effects[number, batch.indices] = change.cpu().double().numpy()
        return effects

    return fitting(model, "joint", min(batch_size, len(data)), passes)


@torch.no_grad()
def _measured(model: TransformerBridge, batch: Batch, metric: Metric) -> Float[Tensor, " batch"]:
    return metric(precise(answer_logits(model, batch)), batch)


def _exact(
    model: TransformerBridge,
    scores: Scores,
    spectra: Spectra,
    rows: np.ndarray,
    data: Dataset,
    strength: float,
    metric: Metric,
    batch_size: int,
    most: int,
    progress: bool,
) -> Float[np.ndarray, "component example"]:
    """:func:`exact_effects` with at most so many rows in a pass, copies of examples included."""
    batches = make_batches(data, model, min(batch_size, most))
    effects = np.empty((len(rows), len(data)))
    layers = scores.components["layer"].to_numpy()[rows]
    pairs = paired(batches, data, model) if scores.reference == "pair" else [None] * len(batches)
    bar = tqdm(total=len(rows) * len(batches), desc="exact", disable=not progress)
    for batch, pair in zip(batches, pairs, strict=True):
        goals = _Goals(model, spectra, scores, batch, pair)
        base = _measured(model, batch, metric)
        for layer in np.unique(layers):
            members = np.flatnonzero(layers == layer)
            chunk = max(1, most // len(batch))
            for start in range(0, len(members), chunk):
                which = members[start : start + chunk]
                copies = _Copies(
                    model, spectra, scores, rows[which], int(layer), batch, goals, strength
                )
                for at, logits in zip(which, copies.logits(), strict=True):
                    change = metric(precise(logits), batch) - base
                    effects[at, batch.indices] = change.cpu().double().numpy()
                bar.update(len(which))
    bar.close()
    return effects


class _Goals:
    """What takes the place of coordinates: their means, or what the counterparts hold."""

    def __init__(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        scores: Scores,
        batch: Batch,
        pair: Batch | None,
    ) -> None:
        self._scores = scores
        self._batch = batch
        self._held: dict[str, Tensor] | None = None
        if pair is not None:
            finite = FiniteCheck()
            self._held = activations(model, [s.site for s in spectra.values()], pair, finite)
            finite.check()

    def of(self, spectrum: Spectrum, rows: np.ndarray) -> Float[Tensor, "#batch pos k"]:
        """For these components of one matrix."""
        if self._held is None:
            mean = self._scores.means[rows].at(self._batch.positions)
            return rearrange(torch.tensor(mean, device=spectrum.device), "k pos -> 1 pos k")
        chosen = self._scores.components.iloc[rows]
        c = spectrum.coordinates(self._held[spectrum.name].to(spectrum.dtype))
        head, index = (torch.tensor(chosen[name].to_numpy()) for name in ("head", "index"))
        return c[:, :, head.to(c.device), index.to(c.device)]


class _Copies:
    """One forward pass in which every copy of a batch has another component of a layer frozen."""

    def __init__(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        scores: Scores,
        rows: np.ndarray,
        layer: int,
        batch: Batch,
        goals: "_Goals",
        strength: float,
    ) -> None:
        self._model = model
        self._layer = layer
        self._batch = batch
        self._n = len(rows)
        self._edits: list[tuple[str, Callable[..., Any]]] = []
        kinds = scores.components["matrix"].to_numpy()[rows]
        for kind in dict.fromkeys(kinds):
            copies = np.flatnonzero(kinds == kind)
            spectrum = spectra[f"blocks.{layer}.{kind}"]
            chosen = scores.components.iloc[rows[copies]]
            edit = CopyEdit(
                spectrum,
                chosen["head"].to_numpy(),
                chosen["index"].to_numpy(),
                goals.of(spectrum, rows[copies]),
                copies=copies,
                n_copies=self._n,
                strength=strength,
            )
            self._edits.append((spectrum.site.hook, edit))

    def logits(self) -> Float[Tensor, "copy batch answer d_vocab"]:
        """Logits at the answer positions of every copy."""
        with torch.no_grad(), self._repeated(), self._model.hooks(fwd_hooks=self._edits):
            logits = answer_logits(self._model, self._batch)
        return rearrange(logits, "(copy batch) ... -> copy batch ...", copy=self._n)

    @contextmanager
    def _repeated(self) -> Iterator[None]:
        """Repeat the rows where they enter the layer, and masks from there on."""
        with ExitStack() as stack:
            for layer in range(self._layer, len(self._model.blocks)):
                hook = partial(self._enter, layer == self._layer)
                block = self._model.blocks[layer]
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _enter(
        self, first: bool, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first_arg = tiled(args[0], self._n) if first else args[0]
        args = (first_arg, *map(self._beside, args[1:]))
        return args, {name: self._beside(value) for name, value in kwargs.items()}

    def _beside(self, value: Any) -> Any:
        return tiled_beside(value, self._n, len(self._batch))
