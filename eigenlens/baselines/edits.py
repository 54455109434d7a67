"""Edits: what a method does to a model, or to its prompts, and undoes exactly.

One function, :func:`measure`, evaluates them all: it applies the edit, hands the edit's version of
the prompts to :func:`eigenlens.evaluation.evaluate`, and takes the edit back.
"""

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import Evaluation, evaluate
from eigenlens.files import FileFormatError, load_tensors, save_tensors
from eigenlens.freezing import Freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.provenance import data_hash
from eigenlens.weights import restored

_KIND = "edit"


class Edit(ABC):
    """Something that changes a model's answers and can be taken back."""

    @property
    @abstractmethod
    def parameters_changed(self) -> int:
        """Numbers that the edit sets, in the form in which the method chooses them."""

    @abstractmethod
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file."""

    @contextmanager
    def applied(self, model: TransformerBridge) -> Iterator[None]:
        """Edit ``model`` inside the block; afterwards it is as it was, bit for bit."""
        yield

    def transform(self, data: Dataset) -> Dataset:
        """The prompts as this edit puts them, in the same order."""
        return data


@dataclass(frozen=True)
class StoredEdit(Edit):
    """An edit that named tensors and settings determine.

    Attributes:
        tensors: its numbers by name.
        settings: what JSON can hold; ``strength`` is how much of the edit is made, all of it where
            nothing is said.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    _forms: ClassVar[dict[str, type["StoredEdit"]]] = {}

    def __init_subclass__(cls) -> None:
        StoredEdit._forms[cls.__name__] = cls

    @property
    def parameters_changed(self) -> int:
        """All numbers that the edit holds."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def strength(self) -> float:
        """How much of the edit is made, in [0, 1]."""
        return float(self.settings.get("strength", 1.0))

    def scaled(self, strength: float) -> "StoredEdit":
        """The same edit, made by this much of what it is now."""
        return replace(self, settings={**self.settings, "strength": self.strength * strength})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file."""
        metadata = {"form": type(self).__name__, "settings": dict(self.settings)}
        save_tensors(path, _KIND, dict(self.tensors), metadata)


def load_edit(path: str | os.PathLike[str]) -> Edit:
    """Read back what an edit's ``save`` wrote, a frozen set among them; controls are refused.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: the file is truncated, foreign, or another kind of result.
    """
    try:
        tensors, metadata = load_tensors(path, _KIND)
    except FileFormatError:
        return FrozenEdit(FrozenSet.load(path))
    return StoredEdit._forms[metadata["form"]](tensors, metadata["settings"])


class NoEdit(StoredEdit):
    """The model as it is, the prompts as they are."""


class BiasEdit(StoredEdit):
    """Adds a vector at one hook, the same at every position.

    ``tensors["bias"]`` is ``[width]``; ``settings["hook"]`` names the hook.
    """

    @contextmanager
    def applied(self, model: TransformerBridge) -> Iterator[None]:
        """Add the vector inside the block."""
        with adding(model, self.settings["hook"], self.strength * self.tensors["bias"]):
            yield


@contextmanager
def adding(model: TransformerBridge, hook: str, bias: Float[Tensor, " width"]) -> Iterator[None]:
    """Add ``bias`` to the activations at ``hook`` inside the block, differentiably."""

    def add(value: Tensor, hook: object) -> Tensor:
        return value + bias.to(value).view(
            value.shape[2:]
        )  # some hooks lie behind a split into heads

    with model.hooks(fwd_hooks=[(hook, add)]):
        yield


class WeightEdit(StoredEdit):
    """Puts other values in place of weights and biases, or goes part of the way to them."""

    @abstractmethod
    def changes(self, model: TransformerBridge) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights and biases of ``model``, or views of them, with the values that they get."""

    @contextmanager
    def applied(self, model: TransformerBridge) -> Iterator[None]:
        """Set the new values inside the block, and the kept ones afterwards."""
        with ExitStack() as undo:
            with torch.no_grad():
                for weight, value in self.changes(model):
                    undo.enter_context(restored([weight]))
                    weight.lerp_(value, self.strength)
            yield


@dataclass(frozen=True)
class FrozenEdit(Edit):
    """Components frozen as :func:`eigenlens.freeze` does, or a control of it.

    Attributes:
        frozen: the components.
        bias_only: take nothing away and add only the means; the file of such a control is no
            ``FrozenSet`` file.
    """

    frozen: FrozenSet
    bias_only: bool = False

    @property
    def parameters_changed(self) -> int:
        """A strength per component and its mean at each position, the fallback among them."""
        return len(self.frozen) * (2 + len(self.frozen.means.positions))

    @contextmanager
    def applied(self, model: TransformerBridge) -> Iterator[None]:
        """Put the hooks on inside the block."""
        with Freeze(model, self.frozen, bias_only=self.bias_only):
            yield

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file."""
        self.frozen.save(path)
        if self.bias_only:
            save_tensors(path, "control", *load_tensors(path, "frozen set"))


def saved_bytes(edit: Edit) -> int:
    """Size of the file that ``edit`` is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        edit.save(path)
        return path.stat().st_size


def measure(
    model: TransformerBridge,
    data: Dataset,
    edit: Edit,
    *,
    batch_size: int = 50,
    choices: bool = True,
) -> Evaluation:
    """Loss and accuracy of ``model`` on ``data`` under ``edit``.

    The result lists the prompts of ``data``, not those that the edit made of them, so that it can
    be compared with others example by example.

    Raises:
        ValueError: what :func:`eigenlens.evaluation.evaluate` raises.
    """
    with edit.applied(model):
        found = evaluate(
            model, edit.transform(data), batch_size=batch_size, choices=choices, progress=False
        )
    source = {"task_hash": data_hash(data)}
    return replace(
        found,
        examples=found.examples.assign(prompt=list(data["prompt"])),
        provenance=found.provenance.model_copy(update=source),
    )
