"""How a number that gradient descent can move stands for a gate that is open or shut.

Every relaxation turns the trained vector s into gates for a training step, into the strengths that
are measured (and frozen), and into a price for being open. ``done`` is the share of the training
that is over.

Sources: continuous sparsification, Savarese et al. 2020 (arXiv 1912.04427); hard concrete gates,
Louizos et al. 2018 (arXiv 1712.01312), with its constants; the penalty ``z (1 − z)`` is older than
both and was this project's first.
"""

import math
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Gate = Float[Tensor, " component"]
RelaxationName = Literal["sharpened", "hard_concrete", "penalised"]


@runtime_checkable
class Relaxation(Protocol):
    """What :func:`eigenlens.learned` asks of a relaxation."""

    def sample(self, s: Gate, done: float, generator: torch.Generator) -> Gate:
        """Gates of a training step, differentiable in s."""

    def strength(self, s: Gate, done: float) -> Gate:
        """Gates to measure, without noise."""

    def price(self, s: Gate, z: Gate, done: float) -> Gate:
        """How open each gate counts; ``z`` are the gates of the step."""


class Sharpened:
    """``z = sigmoid(β s)``, with β growing from 1 to ``sharpness``."""

    def __init__(self, sharpness: float) -> None:
        """End at β = ``sharpness``."""
        self._sharpness = sharpness

    def sample(self, s: Gate, done: float, generator: torch.Generator) -> Gate:
        """The gates themselves."""
        return self.strength(s, done)

    def strength(self, s: Gate, done: float) -> Gate:
        """``sigmoid(β s)``."""
        return torch.sigmoid(self._sharpness**done * s)

    def price(self, s: Gate, z: Gate, done: float) -> Gate:
        """The gate."""
        return z


class HardConcrete:
    """A random gate, stretched beyond [0, 1] and clipped, so that it is often exactly 0 or 1."""

    _LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3

    def sample(self, s: Gate, done: float, generator: torch.Generator) -> Gate:
        """A draw."""
        u = torch.rand(len(s), generator=generator).clamp(1e-6, 1 - 1e-6).to(s)
        return self._stretched((torch.logit(u) + s) / self._TEMPERATURE)

    def strength(self, s: Gate, done: float) -> Gate:
        """The gate without noise."""
        return self._stretched(s)

    def price(self, s: Gate, z: Gate, done: float) -> Gate:
        """The probability that the gate is not exactly 0."""
        return torch.sigmoid(s - self._TEMPERATURE * math.log(-self._LOW / self._HIGH))

    def _stretched(self, logit: Gate) -> Gate:
        return (torch.sigmoid(logit) * (self._HIGH - self._LOW) + self._LOW).clamp(0, 1)


class Penalised:
    """``z = sigmoid(s)``; a growing penalty ``z (1 − z)`` drives it from the middle."""

    _WEIGHT = 3.0  # of the penalty at the end, next to the price of an open gate

    def sample(self, s: Gate, done: float, generator: torch.Generator) -> Gate:
        """The gates themselves."""
        return torch.sigmoid(s)

    def strength(self, s: Gate, done: float) -> Gate:
        """``sigmoid(s)``."""
        return torch.sigmoid(s)

    def price(self, s: Gate, z: Gate, done: float) -> Gate:
        """The gate, and its distance from 0 and 1."""
        return z + self._WEIGHT * done * z * (1 - z)


def relaxation(name: RelaxationName | str, sharpness: float) -> Relaxation:
    """The relaxation of that name; ``sharpness`` is for the first.

    Raises:
        ValueError: an unknown name.
    """
    if name == "sharpened":
        return Sharpened(sharpness)
    if name == "hard_concrete":
        return HardConcrete()
    if name == "penalised":
        return Penalised()
    raise ValueError(f"relaxation={name!r}: 'sharpened', 'hard_concrete' or 'penalised'.")
