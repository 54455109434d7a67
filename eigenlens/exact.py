"""Exact effects of single components: really freeze, really measure. The judge of all estimators.

Many components share a forward pass: the blocks below a layer run once for a batch, whose rows are
then repeated, and in every copy another component of that layer is frozen.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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

from eigenlens.inputs import check_data
from eigenlens.memory import fitting
from eigenlens.metrics import Metric, answer_logits, answer_loss, check_eval_mode, precise
from eigenlens.scoring import Scores
from eigenlens.spectra import Spectra, Spectrum, freeze_coordinates
from eigenlens.tasks.batches import Batch, make_batches

_MOST_ROWS = 400  # rows of a pass: more do not make a processor faster, and take memory


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
        scores: give directions and the means that replace activations.
        rows: of ``scores.components``, one component each.
        data: examples to measure on.
        strength: 1 freezes, less attenuates.
        metric: a number per example; the loss in nats by default.
        batch_size: examples per pass.
        progress: show a progress bar.

    Raises:
        ValueError: a model in training mode; scores without directions.
    """
    check_eval_mode(model)
    spectra = scores.spectra_on(model)
    check_data(data)
    run = partial(_exact, model, scores, spectra, np.asarray(rows), data, strength, metric)
    most = max(_MOST_ROWS, batch_size)
    return fitting(model, "exact", most, lambda size: run(batch_size, size, progress))


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
    bar = tqdm(total=len(rows) * len(batches), desc="exact", disable=not progress)
    for batch in batches:
        with torch.no_grad():
            base = metric(precise(answer_logits(model, batch)), batch)
        for layer in np.unique(layers):
            members = np.flatnonzero(layers == layer)
            chunk = max(1, most // len(batch))
            for start in range(0, len(members), chunk):
                which = members[start : start + chunk]
                copies = _Copies(model, spectra, scores, rows[which], int(layer), batch, strength)
                for at, logits in zip(which, copies.logits(), strict=True):
                    change = metric(precise(logits), batch) - base
                    effects[at, batch.indices] = change.cpu().double().numpy()
                bar.update(len(which))
    bar.close()
    return effects


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
            edit = _Edit(spectrum, scores, rows[copies], copies, self._n, batch, strength)
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
        args = (self._tiled(args[0]) if first else args[0], *map(self._side, args[1:]))
        return args, {name: self._side(value) for name, value in kwargs.items()}

    def _side(self, value: Any) -> Any:
        """Masks and positions that have a row per example (or per example and head)."""
        if isinstance(value, tuple):
            return tuple(map(self._side, value))
        rows = len(self._batch)
        if isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] % rows == 0:
            return self._tiled(value)
        return value

    def _tiled(self, value: Tensor) -> Tensor:
        return value.repeat(self._n, *[1] * (value.ndim - 1))


class _Edit:
    """Freezes component k of one matrix in copy k: copies take the place of heads."""

    def __init__(
        self,
        spectrum: Spectrum,
        scores: Scores,
        rows: np.ndarray,
        copies: np.ndarray,
        n_copies: int,
        batch: Batch,
        strength: float,
    ) -> None:
        chosen = scores.components.iloc[rows]
        flat = spectrum.subset(chosen["head"].to_numpy(), chosen["index"].to_numpy())
        assert flat.read is not None
        assert flat.write is not None
        self._own = replace(
            flat,
            read=rearrange(flat.read, "1 width k -> k width 1"),
            write=rearrange(flat.write, "1 k width -> k 1 width"),
        )
        mean = torch.tensor(scores.means[rows].at(batch.positions)).to(flat.write)
        self._mean = rearrange(mean, "k pos -> pos k 1")
        self._copies = torch.tensor(copies, device=flat.write.device)
        self._n = n_copies
        self._strength = strength

    def __call__(self, value: Tensor, hook: Any) -> Tensor:
        h = self._own.site.split(value, len(self._mean))
        h = rearrange(h, "(copy b) pos 1 width -> b pos copy width", copy=self._n)
        edited = freeze_coordinates(h[:, :, self._copies], self._own, self._mean, self._strength)
        h = h.index_copy(2, self._copies, edited)
        h = rearrange(h, "b pos copy width -> (copy b) pos width")
        return h.reshape(value.shape).contiguous()  # Conv1D takes a view of its input
