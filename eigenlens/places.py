"""Where the maps of a model lie in the plain transformers model, and that model's own parameters.

TransformerLens puts modules of its own around those of transformers, and splits matrices that make
several maps at once (GPT-2's ``c_attn``, Phi-3's ``gate_up_proj``). Here its names are traced back
to the model's own, and each map to the output features that it makes there.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eigenlens.bridges import (
    GeneralizedComponent,
    JointGateUpMLPBridge,
    JointQKVAttentionBridge,
    TransformerBridge,
)

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Place:
    """A map in the plain model.

    Attributes:
        module: path of the ``nn.Linear`` or ``Conv1D``.
        runs: those of its output features that this map makes, in order, as first ones and ends of
            runs; ``None``: all.
    """

    module: str
    runs: Runs | None = None

    @classmethod
    def read(cls, stored: Sequence[Any] | None) -> "Place | None":
        """What ``dataclasses.astuple`` and JSON made of a place."""
        if stored is None:
            return None
        module, runs = stored
        return cls(module, None if runs is None else tuple((start, end) for start, end in runs))

    def features(self, device: torch.device) -> Int[Tensor, " all_out"] | None:
        """The numbers of the output features; ``None``: all."""
        if self.runs is None:
            return None
        return torch.cat([torch.arange(*run, device=device) for run in self.runs])

    def weight(self, model: nn.Module) -> Float[Tensor, "all_in all_out"]:
        """Its weight in the plain model, ``x @ W`` orientation."""
        return self.weight_of(model.get_submodule(self.module))

    def weight_of(self, module: nn.Module) -> Float[Tensor, "all_in all_out"]:
        """Its part of the weight of the module, ``x @ W`` orientation."""
        weight = _parameter(module, "weight")
        assert weight is not None
        return self._part(weight if isinstance(module, Conv1D) else weight.T)

    def bias(self, model: nn.Module) -> Float[Tensor, " all_out"] | None:
        """Its bias in the plain model, if there is one."""
        bias = _parameter(model.get_submodule(self.module), "bias")
        return None if bias is None else self._part(bias)

    def _part(self, value: Tensor) -> Tensor:
        features = self.features(value.device)
        return value if features is None else value.index_select(-1, features)


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name)
    return value.detach() if isinstance(value, Tensor) else None


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of a plain model, or of that in a bridge, once, by its name there."""
    root = model.original_model if isinstance(model, TransformerBridge) else model
    seen: set[int] = set()
    for path, _, inner in _plain_modules(root):
        for name, parameter in inner.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{name}".lstrip("."), parameter


def places(model: TransformerBridge) -> dict[nn.Module, Place]:
    """Where each linear map of a bridge, by its module, lies in the plain model.

    Those that differ from their part of the matrix there are left out: TransformerLens makes them
    in a way of its own, or they were changed since.
    """
    return {module: place for module, (place, holds) in _traced(model).items() if holds}


def is_unchanged(model: TransformerBridge) -> bool:
    """Whether all matrices that a bridge has split still are parts of those of the plain model."""
    return all(holds for _, holds in _traced(model).values())


def _traced(model: TransformerBridge) -> dict[nn.Module, tuple[Place, bool]]:
    """Where each linear map of a bridge comes from, and whether it equals what is there."""
    found: dict[nn.Module, Place] = {}
    plain: dict[str, nn.Module] = {}
    whole = Place("")
    layouts: dict[Any, list[Place]] = {}
    for path, component, inner in _plain_modules(model.original_model):
        plain[path] = inner
        if isinstance(inner, nn.Linear | Conv1D):
            found.setdefault(inner, Place(path))
        if isinstance(component, JointQKVAttentionBridge):
            split, parts = component.split_qkv_matrix, [component.q, component.k, component.v]
        elif isinstance(component, JointGateUpMLPBridge):
            split, parts = (
                component.split_gate_up_matrix,
                [component.gate, getattr(component, "in")],
            )
        else:
            continue
        linears = _linears_below(inner)
        alike = type(inner), *((name, linear.weight.shape) for name, linear in linears.items())
        if alike not in layouts:
            layouts[alike] = _layout(inner, linears, split)
        for part, below in zip(parts, layouts[alike], strict=True):
            found[part.original_component] = replace(below, module=f"{path}.{below.module}")
    return {
        module: (place, _equal(place.weight_of(plain[place.module]), whole.weight_of(module)))
        for module, place in found.items()
    }


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether both hold the same numbers; a model on paper has none."""
    return one.is_meta or torch.equal(one, other)


def _plain_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Path in the plain model, what stands there in the bridge, and the plain module."""
    inner = module
    while isinstance(inner, GeneralizedComponent):
        if inner.original_component is None:
            return
        inner = inner.original_component
    yield path, module, inner
    for name, child in inner.named_children():
        yield from _plain_modules(child, f"{path}.{name}".lstrip("."))


def _linears_below(component: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    return {
        path: inner
        for path, _, inner in _plain_modules(component)
        if isinstance(inner, nn.Linear | Conv1D)
    }


def _layout(
    component: nn.Module,
    linears: dict[str, nn.Linear | Conv1D],
    split: Callable[[nn.Module], tuple[nn.Module, ...]],
) -> list[Place]:
    """Split matrices that hold the number of each output, to see which part gets which."""
    weights = {name: linear.weight for name, linear in linears.items()}
    names: list[str] = []
    try:
        for name, linear in linears.items():
            rows, columns = linear.weight.shape
            n_out = columns if isinstance(linear, Conv1D) else rows
            number = torch.arange(len(names), len(names) + n_out, dtype=torch.float64)
            if not isinstance(linear, Conv1D):
                number = number[:, None]
            numbered = number.expand(rows, columns).contiguous()
            linear.weight = nn.Parameter(numbered, requires_grad=False)
            names += [name] * n_out
        with torch.random.fork_rng(devices=[]):
            pieces = split(component)
    finally:
        for name, linear in linears.items():
            linear.weight = weights[name]
    found = []
    for piece in pieces:
        weight = piece.weight
        assert isinstance(weight, Tensor)
        numbers = weight[:, 0].long()  # every piece is an nn.Linear
        name = names[int(numbers[0])]
        found.append(Place(name, _runs((numbers - names.index(name)).tolist())))
    return found


def _runs(numbers: Sequence[int]) -> Runs:
    """Numbers as runs of neighbours, in order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return tuple((start, end) for start, end in runs)
