"""A model whose every component has a gate, and the gradient of the loss by all gates at once.

Inside ``with Gates(model, scores)`` every coordinate runs as ``c + z (c̄ − c)``
(:func:`eigenlens.spectra.freeze_coordinates`): z = 0 is the model as it is, z = 1 freezes component
i and what lies between attenuates it. The gradient by gate i, ``Σ_t (c̄_t − c_t) (w_i · ∂L/∂h_t)``,
is the first-order score of component i under all other gates, and it falls out of the backward
pass. One step costs a forward and a backward pass of the model and four products of the small side,
``4 width · k`` a token and head, for the k components that have a gate: :meth:`Gates.keep` leaves
gates to some.

Memory: the means by position, and one activation per component and token of a batch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.memory import fitting
from eigenlens.metrics import Metric, answer_logits, answer_loss, precise
from eigenlens.positions import PositionTracker, add_hook, attach_tracker
from eigenlens.scoring.references import split_table
from eigenlens.scoring.scores import Scores
from eigenlens.spectra import Directions, Spectrum, freeze_coordinates
from eigenlens.tasks.batches import Batch


class _Gated(NamedTuple):
    """The components of one activation that have gates, and which of all components they are."""

    directions: Directions
    table: Float[Tensor, "row head k"]
    rows: Int[Tensor, " kept"]


class Gates:
    """Runs a model with a gate on every component; a context manager.

    Attributes:
        model: the gated model.
        z: the gates of :meth:`gradient`, in the order of ``scores.components``; all zero at first.
    """

    def __init__(self, model: TransformerBridge, scores: Scores) -> None:
        """Gate the components of ``scores``.

        Args:
            model: the model that was scored, or another object with the same weights.
            scores: give the components, their directions and the means that replace them.

        Raises:
            ValueError: ``scores`` were loaded from a file and have no directions, or belong to
                other weights.
        """
        spectra = scores.spectra_on(model)
        self.model = model
        self._positions = scores.means.positions
        tables = split_table(spectra, torch.tensor(scores.means.table()))
        first = next(iter(spectra.values()))
        numbers = torch.arange(len(scores), device=first.device).split(spectra.sizes)
        self._gated = [
            _Gated(s, tables[s.name], rows)
            for s, rows in zip(spectra.values(), numbers, strict=True)
        ]
        self._gates: list[Float[Tensor, "head k"]] = []
        self.z: Float[Tensor, " component"] = torch.zeros(
            len(scores), dtype=first.dtype, device=first.device
        )
        self._kept = torch.ones_like(self.z)
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> "Gates":
        self.set(self.z)
        try:
            tracker, release = attach_tracker(self.model)
            self._undo.append(release)
            for number, gated in enumerate(self._gated):
                edit = partial(self._edit, tracker, number)
                hook = self.model.hook_dict[gated.directions.site.hook]
                self._undo.append(add_hook(hook, edit))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            self._undo.pop()()
        self._gates = []

    def keep(self, kept: Bool[Tensor, " component"]) -> None:
        """Leave gates to these components alone; those of all others stay shut, at no cost."""
        is_on = bool(self._undo)
        self.__exit__()
        self._kept = kept.to(self._kept)
        narrowed = (_narrowed(gated, kept) for gated in self._gated)
        self._gated = [gated for gated in narrowed if gated is not None]
        if is_on:
            self.__enter__()

    def set(self, z: Float[Tensor, " component"]) -> None:
        """Use the gates ``z`` in the forward passes to come."""
        z = z * self._kept
        self._gates = [
            z[gated.rows].to(gated.table).view(gated.table.shape[1:]) for gated in self._gated
        ]

    def gradient(
        self, batch: Batch, metric: Metric = answer_loss
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " component"]]:
        """The metric of each example under :attr:`z`, and the gradient of its sum by every gate."""

        def passes(size: int) -> tuple[Tensor, Tensor]:
            parts = [self._gradient(part, metric) for part in batch.split(size)]
            values, slopes = zip(*parts, strict=True)
            return torch.cat(values), sum(slopes[1:], slopes[0])

        return fitting(self.model, "gates", len(batch), passes)

    def _gradient(
        self, batch: Batch, metric: Metric
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " component"]]:
        with torch.enable_grad():
            z = self.z.detach().requires_grad_()
            self.set(z)
            values = metric(precise(answer_logits(self.model, batch)), batch)
            (slope,) = torch.autograd.grad(values.sum(), z)
        return values.detach(), slope

    def _edit(self, tracker: PositionTracker, number: int, value: Tensor, hook: Any) -> Tensor:
        directions, table, _ = self._gated[number]
        h = directions.site.split(value, tracker.positions.shape[-1])
        mean = table[self._positions.rows(tracker.positions.to(table.device))]
        return freeze_coordinates(h, directions, mean, self._gates[number]).reshape(value.shape)


def _narrowed(gated: _Gated, kept: Bool[Tensor, " component"]) -> _Gated | None:
    """What is left of the gates of one activation; ``None`` where nothing is."""
    directions, table, rows = gated
    here = kept[rows].nonzero()[:, 0]
    if not len(here):
        return None
    k = table.shape[-1]
    # A few directions over all heads side by side cost less than all of each head; many do not,
    # and a basis that is standard costs nothing.
    if not isinstance(directions, Spectrum) or directions.read is None or len(here) >= k:
        return gated
    head, index = np.divmod(here.cpu().numpy(), k)
    flat = rearrange(table, "row head k -> row 1 (head k)")[..., here.to(table.device)]
    return _Gated(directions.subset(head, index), flat, rows[here])


@contextmanager
def faster_products() -> Iterator[None]:
    """Let float32 matrix products run in bfloat16 inside, where the processor has units for it.

    For searching only: on a CPU with AMX a step takes half the time, and its noise (0.2 % of a
    product) is far below that of a minibatch. What is reported is measured outside.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
