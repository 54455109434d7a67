"""``bake``: an edit under shared means as a plain transformers folder with edited weights.

The components come off the weights, and their mean goes into biases. Where a map has none, the
architecture's own configuration may have a switch that gives it one (Llama's ``attention_bias``);
maps that get one along with it have zeros there.
"""

import os
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from eigenlens.evaluation import Evaluation
from eigenlens.export.card import model_card
from eigenlens.export.low_rank import LowRank, check_shared, low_rank_changes
from eigenlens.export.plain import sharing_copy
from eigenlens.files import write_text
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import UnsupportedModelError


def bake(
    model: PreTrainedModel,
    frozen: FrozenSet,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    before: Evaluation | None = None,
    after: Evaluation | None = None,
) -> None:
    """Write a model with edited weights, which transformers loads without eigenlens.

    Args:
        model: the plain transformers model that ``frozen`` was made for; it stays as it is.
        frozen: components with shared means.
        folder: where weights, configuration and model card go.
        tokenizer: written there, too.
        before: what the model card says of the model without the edit.
        after: what the model card says of the edited model.

    Raises:
        PositionBiasError: means by position.
        UnsupportedModelError: a map needs a bias and the architecture has none.
        WrongModelError, ValueError: as :func:`eigenlens.attach`.
    """
    check_shared(frozen, "A plain model")
    changes = low_rank_changes(model, frozen)
    baked = sharing_copy(model)
    flags, gained = _bias_flags(model, _without_bias(model, changes))
    for flag in flags:
        setattr(baked.config, flag, True)
    with torch.no_grad():
        for path in gained:
            _give_bias(baked.get_submodule(path))
        for path, change in changes.items():
            _apply(baked.get_submodule(path), change)
    baked.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    base = model.name_or_path or type(model).__name__
    write_text(Path(folder) / "README.md", model_card(frozen, base, before, after))


def _without_bias(model: nn.Module, changes: dict[str, LowRank]) -> set[str]:
    """Maps that need a bias and have none."""
    return {
        path
        for path, change in changes.items()
        if getattr(model.get_submodule(path), "bias", None) is None and change.bias.any()
    }


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


def _give_bias(module: nn.Module) -> None:
    assert isinstance(module, nn.Linear)
    module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))


def _apply(module: nn.Module, change: LowRank) -> None:
    """Put new weights, made in the precision of the directions, in place of those shared."""
    assert isinstance(module, nn.Linear | Conv1D)
    delta = change.weight if isinstance(module, Conv1D) else change.weight.T
    for name, added in (("weight", delta), ("bias", change.bias)):
        old = getattr(module, name)
        if old is not None:
            value = (old.to(added) + added).to(old.dtype).contiguous()
            setattr(module, name, nn.Parameter(value, requires_grad=False))
