"""Where the maps of a bridge lie in the plain transformers model.

TransformerLens puts modules of its own around those of transformers, and splits matrices that make
several maps at once (GPT-2's ``c_attn``, Phi-3's ``gate_up_proj``). Here its names are traced back
to the model's own, and each map to the output features that it makes there.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    JointGateUpMLPBridge,
    JointQKVAttentionBridge,
)
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eigenlens.matrices import UnsupportedModelError, WeightMatrix
from eigenlens.models.peft_adapters import has_adapter
from eigenlens.models.wrapping import check_architecture


@dataclass(frozen=True)
class Place:
    """A map in the plain model.

    Attributes:
        module: path of the ``nn.Linear`` or ``Conv1D``.
        features: those of its outputs that this map makes; ``None``: all.
    """

    module: str
    features: Int[Tensor, " all_out"] | None = None

    def weight(self, model: nn.Module) -> Float[Tensor, "all_in all_out"]:
        """Its weight in the plain model, ``x @ W`` orientation."""
        module = model.get_submodule(self.module)
        weight = _parameter(module, "weight")
        assert weight is not None
        return self._part(weight if isinstance(module, Conv1D) else weight.T)

    def bias(self, model: nn.Module) -> Float[Tensor, " all_out"] | None:
        """Its bias in the plain model, if there is one."""
        bias = _parameter(model.get_submodule(self.module), "bias")
        return None if bias is None else self._part(bias)

    def _part(self, value: Tensor) -> Tensor:
        if self.features is None:
            return value
        return value.index_select(-1, self.features.to(value.device))


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name)
    return value.detach() if isinstance(value, Tensor) else None


def bridge_around(model: nn.Module) -> TransformerBridge:
    """A bridge of the same weights, which are not copied, that leaves the plain model alone.

    Only matrices that TransformerLens splits are copied. It has no tokenizer.

    Raises:
        ValueError: no plain model of transformers, or one with an adapter in it.
        UnsupportedModelError: TransformerLens has no bridge for it.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"The model is a {type(model).__name__} and no plain model of transformers: give what "
            "AutoModelForCausalLM.from_pretrained returns (and use freeze for a bridge)."
        )
    if has_adapter(model) or any(isinstance(m, GeneralizedComponent) for m in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} holds an adapter of peft or belongs to a bridge: give "
            "the plain model."
        )
    copy = sharing_copy(model)
    known = (c.__name__ for c in type(model).__mro__ if c.__name__ in SUPPORTED_ARCHITECTURES)
    copy.config.architectures = [name := next(known, type(model).__name__)]
    check_architecture(copy.config)
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # TransformerLens draws weights, and drops them
        config = build_bridge_config_from_hf(copy.config, name, name, weight.dtype)
        config.device = str(weight.device)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
        adapter.prepare_model(copy)
        return TransformerBridge(copy, adapter, None)


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own around the same numbers."""
    shared: dict[int, object] = {}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return deepcopy(model, shared)


def places(model: TransformerBridge) -> dict[nn.Module, Place]:
    """Where each linear map of a bridge, by its module, lies in the plain model."""
    found: dict[nn.Module, Place] = {}
    layouts: dict[Any, list[Place]] = {}
    for path, component, inner in _plain_modules(model.original_model):
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
    return found


def place_of(matrix: WeightMatrix, known: dict[nn.Module, Place], model: nn.Module) -> Place:
    """Where one map of a bridge lies in the plain ``model`` that it stands around.

    Raises:
        UnsupportedModelError: TransformerLens makes it from others in a way of its own.
    """
    place = known.get(matrix.module)
    if place is None or not torch.equal(place.weight(model), matrix.flat_weight):
        raise UnsupportedModelError(
            f"{matrix.name} is no linear map of the plain transformers model: its edit lives in "
            "TransformerLens only."
        )
    return place


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
        found.append(Place(name, numbers - names.index(name)))
    return found
