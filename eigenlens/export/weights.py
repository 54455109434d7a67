"""Edited weights in a plain model: new parameters, and biases where its architecture has a switch.

A configuration may have a switch that gives maps a bias (Llama's ``attention_bias``, ``mlp_bias``).
Maps that get one along with those that need it have zeros there.
"""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eigenlens.export.low_rank import LowRank
from eigenlens.matrices import UnsupportedModelError


def linear_at(model: nn.Module, path: str) -> nn.Module:
    """The map itself, also where a layer of peft stands in front of it."""
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module)


def give_biases(model: PreTrainedModel, needed: Iterable[str]) -> None:
    """Give biases of zero to maps that need one, and set the switches of the configuration.

    Raises:
        UnsupportedModelError: the architecture has none for some of them; nothing is changed.
    """
    missing = {path for path in needed if getattr(linear_at(model, path), "bias", None) is None}
    flags, gained = _bias_flags(model, missing)
    for flag in flags:
        setattr(model.config, flag, True)
    for path in gained:
        module = linear_at(model, path)
        assert isinstance(module, nn.Linear)
        module.bias = nn.Parameter(module.weight.detach().new_zeros(module.out_features))


def _bias_flags(model: PreTrainedModel, needed: set[str]) -> tuple[list[str], set[str]]:
    """Switches of the configuration that give these maps a bias, and all maps that get one.

    Raises:
        UnsupportedModelError: there is none for some of them.
    """
    if not needed:
        return [], set()
    own = _skeleton(type(model), model.config)
    flags, gained = [], set[str]()
    for flag, value in model.config.to_dict().items():
        if "bias" not in flag or value is not False:
            continue
        config = deepcopy(model.config)
        setattr(config, flag, True)
        more = _skeleton(type(model), config) - own
        found = {name.removesuffix(".bias") for name in more if name.endswith(".bias")}
        if found & needed and len(found) == len(more):
            flags.append(flag)
            gained |= found
    missing = sorted(needed - gained)
    if missing:
        raise UnsupportedModelError(
            f"Baking needs a bias in {_kinds(missing)}, which a {type(model).__name__} cannot "
            "have: write a LoRA adapter with to_lora instead, which brings its own, or freeze no "
            "components there."
        )
    return flags, gained


def _skeleton(kind: type[PreTrainedModel], config: PretrainedConfig) -> set[str]:
    """Names of the parameters of such a model."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return {name for name, _ in kind(config).named_parameters()}


def _kinds(paths: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(path.rsplit(".", 1)[-1] for path in paths))


def apply_change(module: nn.Module, change: LowRank) -> None:
    """Put new weights, made in the precision of the directions, in place of those shared."""
    assert isinstance(module, nn.Linear | Conv1D)
    delta = change.weight if isinstance(module, Conv1D) else change.weight.T
    for name, added in (("weight", delta), ("bias", change.bias)):
        old = getattr(module, name)
        if old is not None:
            value = (old.to(added) + added).to(old.dtype).contiguous()
            setattr(module, name, nn.Parameter(value, requires_grad=False))
