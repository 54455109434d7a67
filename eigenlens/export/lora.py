"""``to_lora``: an edit under shared means as an ordinary LoRA adapter of peft.

Taking k components off a matrix is a change of rank k, and the shared mean is LoRA's bias
(``lora_bias``), so that the adapter is the edit itself and no approximation. It loads with peft
alone.
"""

import os
import re

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eigenlens.export.low_rank import low_rank_changes
from eigenlens.export.refusals import check_export, check_not_base
from eigenlens.frozen_set import FrozenSet
from eigenlens.models.peft_adapters import import_peft, write_adapter


def to_lora(
    model: nn.Module,
    frozen: FrozenSet,
    folder: str | os.PathLike[str],
    *,
    allow_dtype: bool = False,
) -> None:
    """Write a LoRA adapter that does what ``frozen`` does.

    Args:
        model: the plain transformers model that ``frozen`` was made for.
        frozen: components with shared means.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.
        allow_dtype: as for :func:`eigenlens.freeze`.

    Raises:
        PositionBiasError: means by position.
        ImportError: peft is not installed.
        WrongModelError, UnsupportedModelError: as :func:`eigenlens.attach`.
        ValueError: as :func:`eigenlens.bake`.
    """
    peft = import_peft("Writing an adapter")
    out = check_export(frozen, "lora", folder)
    check_not_base(model, out)
    changes = low_rank_changes(model, frozen, allow_dtype=allow_dtype)
    ranks = {re.escape(path): change.down.shape[1] for path, change in changes.items()}
    biased = any(bool(change.bias.any()) for change in changes.values())
    tensors: dict[str, Tensor] = {}
    for path, change in changes.items():
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = change.down.T
        tensors[f"{name}.lora_B.weight"] = change.up.T
        if biased:
            tensors[f"{name}.lora_B.bias"] = change.bias
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=getattr(model, "name_or_path", None),
        target_modules=list(changes),
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=ranks,
        alpha_pattern=ranks,  # alpha / r = 1
        lora_bias=biased,
        fan_in_fan_out=all(isinstance(model.get_submodule(path), Conv1D) for path in changes),
        inference_mode=True,
    )
    write_adapter(config, tensors, out)
