"""The one training loop: Adam on minibatches, stopped early on validation.

The loss is the mean negative log-likelihood of the answers (:func:`eigenlens.metrics.answer_loss`),
that of scoring and evaluation. After each epoch the edit as it stands is a candidate like any
other, so that the epoch is chosen on validation together with the other hyper-parameters. Steps run
with the same faster products as those of the search by gates; all that is measured does not.

Where the model's own text is protected, its divergence from the unedited model is a penalty in
every step, and the best edit of a run is scaled back until the other half of that text is within
the bound.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.baseline import Baseline, Search, rank
from eigenlens.baselines.edits import StoredEdit
from eigenlens.evaluation import Evaluation
from eigenlens.gates import faster_products
from eigenlens.matrices import WeightMatrix
from eigenlens.metrics import answer_logits, answer_loss, precise
from eigenlens.search import Protection
from eigenlens.tasks.batches import Batch, make_batches

_STRENGTHS = (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
_TEXT_AT_ONCE = 16  # passages per step: about the tokens of a minibatch of short prompts


class Trainable(ABC):
    """Numbers that a model can run with, and that gradients reach."""

    @property
    @abstractmethod
    def parameters(self) -> Sequence[Tensor]:
        """What is trained."""

    @abstractmethod
    def live(self, model: TransformerBridge) -> AbstractContextManager[None]:
        """Let ``model`` run with these numbers inside the block, differentiably."""

    @abstractmethod
    def edit(self) -> StoredEdit:
        """The edit that they are now, apart from what further training does to them."""


@dataclass(frozen=True)
class Trained(Baseline):
    """A baseline whose edit is trained.

    Attributes:
        learning_rates: of Adam; chosen on validation.
        epochs: passes over the train split, at most.
        patience: epochs without a better validation result after which a run stops.
        bound: most nats per token that the model's own text may diverge; ``None`` for any.
        weight: of that divergence in the training loss; 0 for none.
    """

    learning_rates: tuple[float, ...] = (1e-3, 1e-2)
    epochs: int = 20
    patience: int = 3
    bound: float | None = None
    weight: float = 0.0

    @abstractmethod
    def trainables(self, search: Search) -> Iterable[tuple[dict[str, Any], Trainable]]:
        """Fresh numbers for each setting of the other hyper-parameters."""

    def parts(self, model: TransformerBridge) -> Sequence[Baseline]:
        """One for each learning rate."""
        return [replace(self, learning_rates=(rate,)) for rate in self.learning_rates]

    def find(self, search: Search) -> None:
        """One run per learning rate and setting, one candidate per epoch, or per run if bounded."""
        protect = self._protection(search.model)
        for lr in self.learning_rates:
            for settings, trainable in self.trainables(search):
                chosen = {**settings, "lr": lr}
                if self.bound is None or protect is None:
                    self._train(search, trainable, chosen, protect)
                else:
                    apart = replace(search, best=None, trace=[])
                    whole = self._train(apart, trainable, chosen, protect)
                    chosen["looks"] = len(apart.trace)
                    _offer_within(search, whole, chosen, protect)

    def _protection(self, model: TransformerBridge) -> Protection | None:
        if self.bound is None and not self.weight:
            return None
        bound = math.inf if self.bound is None else self.bound
        return Protection.of_own_text(
            model, bound=bound, price=0.0, weight=self.weight, batch_size=_TEXT_AT_ONCE
        )

    def _train(
        self,
        search: Search,
        trainable: Trainable,
        settings: dict[str, Any],
        protect: Protection | None,
    ) -> StoredEdit:
        """Consider the edit after each epoch; returns the best of them."""
        adam = torch.optim.Adam(trainable.parameters, lr=settings["lr"])
        generator = torch.Generator().manual_seed(search.seed)
        best: tuple[StoredEdit, Evaluation] | None = None
        waited, kept = 0, trainable.edit()
        for epoch in range(1, self.epochs + 1):
            batches = shuffled_batches(search.task.train, search, generator)
            with trainable.live(search.model), faster_products():
                first = (epoch - 1) * len(batches)
                loss = train_epoch(search.model, batches, adam, protect, first)
            edit = trainable.edit()
            found = search.consider(edit, **settings, epoch=epoch, train_loss=loss)
            if best is None or rank(edit, found) > rank(*best):
                best, waited, kept = (edit, found), 0, edit
            else:
                waited += 1
            if waited == self.patience:
                break
        return kept


def _offer_within(
    search: Search, whole: StoredEdit, settings: dict[str, Any], protect: Protection
) -> None:
    """Consider an edit at the largest strength that is within the bound."""
    for strength in _STRENGTHS:
        edit = whole.scaled(strength)
        with edit.applied(search.model):
            divergence = protect.measure()
        if protect.holds(divergence):
            search.consider(edit, **settings, strength=strength, **divergence)
            return


def shuffled_batches(data: Dataset, search: Search, generator: torch.Generator) -> list[Batch]:
    """Minibatches of examples of similar length in random order.

    Prompts of equal length are mixed anew; what differs in length stays apart, so that little is
    padded.
    """
    rows = torch.randperm(len(data), generator=generator).tolist()
    batches = make_batches(data.select(rows), search.model, search.batch_size)
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in order]


def train_epoch(
    model: TransformerBridge,
    batches: Sequence[Batch],
    optimiser: torch.optim.Optimizer,
    protect: Protection | None = None,
    first: int = 0,
) -> float:
    """One step per batch; returns the mean loss of an example before its step, in nats.

    ``first`` is the number of steps before, by which protected texts take turns.
    """
    total, n = 0.0, 0
    for step, batch in enumerate(batches, first):
        with torch.enable_grad():
            loss = answer_loss(precise(answer_logits(model, batch)), batch)
            optimiser.zero_grad()
            loss.mean().backward()
            if protect is not None and protect.weight:
                protect.penalty(step).backward()
        optimiser.step()
        total, n = total + float(loss.detach().sum()), n + len(batch)
    return total / n


@contextmanager
def replaced(model: TransformerBridge, modules: Mapping[WeightMatrix, nn.Module]) -> Iterator[None]:
    """Run other modules in place of linear maps inside the block."""
    with ExitStack() as undo:
        for matrix, module in modules.items():
            slots = model.get_submodule(matrix.hook_in.removesuffix(".hook_in"))._modules
            undo.callback(slots.__setitem__, "_original_component", matrix.module)
            slots["_original_component"] = module
        yield
