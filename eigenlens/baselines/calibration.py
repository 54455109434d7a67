"""Calibration of the output alone: is a gain format or skill?

A vector over the vocabulary is added to the logits of every answer token. It can make answers
likelier that fit the task, but the same ones for every prompt: what it reaches is format.

``averaged`` needs no training: the bias of a token is the log of how often it stands in training
answers over how probable the model finds it there on average, as in contextual calibration (Zhao et
al., 2021) with the task's own prompts in place of content-free ones. ``learned`` trains the vector.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from eigenlens.baselines.baseline import Baseline, Search
from eigenlens.baselines.bias import TrainableBias
from eigenlens.baselines.edits import BiasEdit
from eigenlens.baselines.training import Trainable, Trained
from eigenlens.metrics import answer_logits
from eigenlens.tasks.batches import make_batches

HOOK = "unembed.hook_out"


@dataclass(frozen=True)
class AveragedCalibration(Baseline):
    """Bias of the logits from answer frequencies and mean probabilities.

    Attributes:
        strengths: factors of the bias to try.
        smoothing: probabilities added to both before the logarithm, to try.
    """

    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    smoothing: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    name: str = "output calibration, averaged"

    def find(self, search: Search) -> None:
        """One candidate per strength and smoothing."""
        frequency, probability = answer_statistics(search)
        for smoothing in self.smoothing:
            bias = (frequency + smoothing).log() - (probability + smoothing).log()
            for strength in self.strengths:
                edit = BiasEdit({"bias": strength * bias}, {"hook": HOOK})
                search.consider(edit, strength=strength, smoothing=smoothing)


def answer_statistics(search: Search) -> tuple[Float[Tensor, " vocab"], Float[Tensor, " vocab"]]:
    """How often each token is in training answers, and its mean probability there."""
    frequency: Tensor | float = 0.0
    probability: Tensor | float = 0.0
    n = 0
    for batch in make_batches(search.task.train, search.model, search.batch_size):
        with torch.no_grad():
            logits = answer_logits(search.model, batch)[batch.answer_mask]
        probability = probability + logits.double().softmax(-1).sum(0)
        tokens = batch.answer[batch.answer_mask]
        frequency = frequency + torch.bincount(tokens, minlength=logits.shape[-1]).double()
        n += len(tokens)
    return torch.as_tensor(frequency) / n, torch.as_tensor(probability) / n


@dataclass(frozen=True)
class LearnedCalibration(Trained):
    """Trains a bias of the logits."""

    learning_rates: tuple[float, ...] = (1e-2, 1e-1)
    name: str = "output calibration, learned"

    def trainables(self, search: Search) -> Iterator[tuple[dict[str, Any], Trainable]]:
        """One vector over the vocabulary."""
        yield {}, TrainableBias(search.model, HOOK, search.model.cfg.d_vocab)
