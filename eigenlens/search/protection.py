"""Data on which an edit must stay close to the unedited model.

Closeness is ``KL(unedited ‖ edited)`` per answer token, in nats. One half of each data set steers a
search: it gives every component a price in proportion to the harm that freezing it is predicted to
do, and the constant that does least (:mod:`eigenlens.search.predicted_harm`), or a penalty at every
step. The other half decides whether an edit is within the bound. What an edit costs is reported on
examples that did neither, where these are given.
Memory: the unedited log-probabilities, ``answer tokens × d_vocab`` floats.
"""

from collections.abc import Mapping
from functools import reduce
from itertools import chain, zip_longest
from operator import add
from typing import Any, NamedTuple

import pandas as pd
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import Evaluation, evaluate
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.gates import Gates
from eigenlens.inputs import check_data
from eigenlens.memory import fitting
from eigenlens.metrics import Metric, answer_logits, kl_to_unedited, precise
from eigenlens.scoring import Scores
from eigenlens.search.predicted_harm import PredictedHarm, predicted_harm
from eigenlens.tasks.batches import Batch, make_batches
from eigenlens.tasks.own_text import OWN_TEXT, own_text


class _Part(NamedTuple):
    """Examples of one data set: their batches, and their divergence from the unedited model."""

    data: Dataset
    batches: list[Batch]
    divergence: Metric

    def per_token(self, total: Tensor | float) -> float:
        """A sum over all examples, divided by their answer tokens."""
        tokens = torch.stack([batch.answer_mask.sum().cpu() for batch in self.batches]).sum()
        return float(total / tokens)


class Protection:
    """Keeps searches from changing what a model does elsewhere."""

    def __init__(
        self,
        model: TransformerBridge,
        data: Mapping[str, Dataset],
        *,
        unseen: Mapping[str, Dataset] | None = None,
        bound: float = 0.05,
        price: float = 6.0,
        move_means: bool = True,
        weight: float = 10.0,
        batch_size: int = 50,
    ) -> None:
        """Run the unedited model over the data.

        Args:
            model: unedited, in eval mode.
            data: by name: examples with the columns ``prompt`` and ``answer``; two at least.
            unseen: other examples, by the same names, that searches do not look at: what
                :meth:`table` is of. By default it is of the half that also decides, which flatters.
            bound: most nats per answer token that an edit may diverge on any data set.
            price: of a gate in ``learned``, nats of loss per nat of predicted divergence.
            move_means: where gates have a price, ``learned`` freezes at the constants that are
                predicted to diverge least, and not at the task's means.
            weight: of a penalty on the divergence itself in ``learned``, at the price of a second
                forward and backward pass a step. Needed where the model is sure of its answers:
                the prediction is of second order, and nothing there. Plain text does without.
            batch_size: examples per pass.

        Raises:
            ValueError: no data set, or one with fewer than two examples; other names of ``unseen``;
                a bound or weight below zero.
        """
        if min(bound, price, weight) < 0:
            raise ValueError(
                f"bound={bound}, price={price}, weight={weight}: none may be below zero."
            )
        if not data:
            raise ValueError("No data to protect: give at least one data set by name.")
        if unseen is not None and set(unseen) != set(data):
            raise ValueError(
                f"Protected are {', '.join(data)}, and unseen examples are of {', '.join(unseen)}."
            )
        for rows in data.values():
            check_data(rows)
        short = [name for name, rows in data.items() if len(rows) < 2]
        if short:
            raise ValueError(f"{', '.join(short)}: two protected examples at least are needed.")
        self.data = dict(data)
        self.bound = bound
        self.price = price
        self.move_means = move_means
        self.weight = weight
        self._model = model
        self._batch_size = batch_size
        self._steering = {name: _half(rows, 0) for name, rows in data.items()}
        self._checking = {name: self._part(_half(rows, 1)) for name, rows in data.items()}
        self._reported = self._checking
        if unseen is not None:
            self._reported = {name: self._part(unseen[name]) for name in data}
        self._turns = self._alternating() if weight else []

    @classmethod
    def of_own_text(cls, model: TransformerBridge, **options: Any) -> "Protection":
        """Protect text that the model writes itself (:func:`eigenlens.own_text`).

        Raises:
            OwnTextError: it cannot be read back.
        """
        return cls(model, {OWN_TEXT: own_text(model)}, **options)

    def _alternating(self) -> list[tuple[Batch, Metric]]:
        """Batches of the steering halves; the data sets take turns."""
        parts = [self._part(rows) for rows in self._steering.values()]
        turns = zip_longest(*([(b, part.divergence) for b in part.batches] for part in parts))
        return [turn for turn in chain.from_iterable(turns) if turn is not None]

    def _part(self, data: Dataset) -> _Part:
        return _Part(
            data,
            make_batches(data, self._model, self._batch_size),
            kl_to_unedited(self._model, data, self._batch_size),
        )

    def harm(self, scores: Scores, *, progress: bool = True) -> PredictedHarm:
        """What freezing each component is predicted to do to the steering halves, added up."""
        found = [
            predicted_harm(
                self._model, scores, data, batch_size=self._batch_size, progress=progress
            )
            for data in self._steering.values()
        ]
        return reduce(add, found)

    def slope(self, gates: Gates, step: int) -> Float[Tensor, " component"]:
        """Gradient of the penalty by every gate, on one batch; batches take turns by ``step``."""
        if not self._turns:
            return torch.zeros_like(gates.z)
        batch, divergence = self._turns[step % len(self._turns)]
        _, slope = gates.gradient(batch, divergence)
        return self.weight * slope / batch.answer_mask.sum().to(slope.device)

    def penalty(self, step: int) -> Float[Tensor, ""]:
        """The penalty of the model as it runs now, differentiably, on the batch of ``step``."""
        batch, divergence = self._turns[step % len(self._turns)]
        total = divergence(precise(answer_logits(self._model, batch)), batch).sum()
        return self.weight * total / batch.answer_mask.sum().to(total.device)

    def measure(self) -> dict[str, float]:
        """Divergence of the model as it is now on the checking halves, in nats per answer token."""
        return self._measure(self._checking)

    def _measure(self, parts: Mapping[str, _Part]) -> dict[str, float]:
        found = {}
        with torch.no_grad():
            for name, part in parts.items():
                total = sum(self._divergence(part.divergence, b) for b in part.batches)
                found[name] = part.per_token(total)
        return found

    def _divergence(self, metric: Metric, batch: Batch) -> Tensor:
        def passes(size: int) -> Tensor:
            parts = batch.split(size)
            each = [metric(precise(answer_logits(self._model, b)), b).sum() for b in parts]
            return torch.stack(each).sum()

        return fitting(self._model, "evaluate", len(batch), passes)

    def holds(self, divergence: Mapping[str, float]) -> bool:
        """Whether every data set is within the bound (false for NaN)."""
        return all(value <= self.bound for value in divergence.values())

    def table(self, frozen: FrozenSet) -> pd.DataFrame:
        """Before and after, on the unseen examples.

        Divergence and losses are in nats per answer token, accuracies shares of the examples.
        """
        before = self._evaluate()
        with freeze(self._model, frozen):
            divergence, after = self._measure(self._reported), self._evaluate()
        return pd.DataFrame(
            {
                "data": name,
                "examples": before[name].n,
                "divergence": divergence[name],
                "bound": self.bound,
                "loss_before": before[name].token_loss,
                "loss_after": after[name].token_loss,
                "accuracy_before": before[name].accuracy,
                "accuracy_after": after[name].accuracy,
            }
            for name in self._reported
        )

    def _evaluate(self) -> dict[str, Evaluation]:
        return {
            name: evaluate(
                self._model, part.data, batch_size=self._batch_size, choices=False, progress=False
            )
            for name, part in self._reported.items()
        }


def _half(rows: Dataset, which: int) -> Dataset:
    """Every other example."""
    return rows.select(range(which, len(rows), 2))
