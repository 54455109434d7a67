"""Adapters of peft: found beside or in place of a base model, and merged into it when asked."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from eigenlens.errors import MissingPackageError, reason
from eigenlens.files import FileFormatError, read_json, write_text
from eigenlens.folders import whole_folder
from eigenlens.models.weight_files import check_file, check_folder, check_loaded, refuse_pickle
from eigenlens.models.wording import listed

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def has_adapter(model: nn.Module) -> bool:
    """Whether peft has wrapped the model or put layers into it."""
    return any(type(module).__module__.startswith("peft.") for module in model.modules())


def adapter_folder(source: str) -> Path | None:
    """The local folder ``source`` if an adapter lies in it."""
    return Path(source) if (Path(source) / CONFIG).is_file() else None


def refusal(folder: Path) -> str:
    """What to do with a folder that holds an adapter, when merging was not asked for."""
    merge = "load_model(..., merge_adapter=True) merges it into its base model"
    if (folder / "config.json").is_file():
        return (
            f"{folder / CONFIG} is a peft adapter beside a base model: {merge}; to load the base "
            f"model alone, move the adapter's files away."
        )
    return f"{folder / CONFIG} belongs to a peft adapter, not to a model: {merge}."


def base_name(folder: Path) -> str:
    """Where the base model of an adapter comes from: its own folder, or what its config names.

    Raises:
        FileFormatError: the adapter's configuration is damaged or names no base model.
    """
    if (folder / "config.json").is_file():
        return str(folder)
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise FileFormatError(f"{folder / CONFIG} names no base model: fill in its path or name.")
    return name


def merged_folder(folder: Path, base: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base model with the adapter of ``folder`` merged into its weights.

    Raises:
        FileFormatError: files are damaged, or the adapter does not fit the base model.
        ImportError: peft is not installed.
    """
    peft = import_peft("Merging an adapter")
    refuse_pickle(folder, "adapter_model")
    for file in sorted(folder.glob("adapter_model.*")):
        check_file(file)
    model = _base_model(base, dtype)
    try:
        wrapped = peft.PeftModel(model, peft.PeftConfig.from_pretrained(folder))
        result = wrapped.load_adapter(folder, "default", torch_device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise FileFormatError(
            f"The adapter in {folder} does not fit its base model {base}: {reason(error)}"
        ) from error
    strays = [*result.missing_keys, *result.unexpected_keys]
    if strays:
        raise FileFormatError(
            f"The tensors of the adapter in {folder} are not those that its base model {base} "
            f"needs: {listed(sorted(strays))}."
        )
    return merged(wrapped)


def merged(model: nn.Module) -> PreTrainedModel:
    """A model that peft has wrapped, with the adapter merged into its weights.

    Raises:
        ValueError: an adapter that no weights can stand for, or that peft does not hold itself.
    """
    merge = getattr(model, "merge_and_unload", None)
    if merge is None:
        raise ValueError(
            f"The adapter in this {type(model).__name__} cannot be merged: only a model that peft "
            "has wrapped (get_peft_model, PeftModel.from_pretrained), with an adapter of matrices "
            "such as LoRA, becomes plain weights."
        )
    return merge(safe_merge=True)


def import_peft(purpose: str) -> ModuleType:
    """The package peft.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPackageError(
            f"{purpose} needs peft, which is not installed: pip install 'eigenlens[peft]'."
        ) from error
    return peft


def _base_model(base: str, dtype: torch.dtype) -> PreTrainedModel:
    with _without_adapter(base) as source:
        if Path(source).is_dir():
            check_folder(Path(source))
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
    check_loaded(info, base, type(model).__name__)
    return model


@contextmanager
def _without_adapter(base: str) -> Iterator[str]:
    """The folder without the adapter's files, which transformers would put into the model."""
    if adapter_folder(base) is None:
        yield base
        return
    with tempfile.TemporaryDirectory() as temporary:
        for file in Path(base).iterdir():
            if not file.name.startswith("adapter_"):
                (Path(temporary) / file.name).symlink_to(file.resolve())
        yield temporary


def write_adapter(
    config: Any, tensors: Mapping[str, Tensor], folder: Path, card: str | None = None
) -> None:
    """Write a peft configuration and the tensors of its adapter, as peft names them.

    Raises:
        UnwritableError: no room, or no right to write there.
    """
    with whole_folder(folder, CONFIG, "adapter_model*") as new:
        config.save_pretrained(os.fspath(new))
        contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
        safetensors.torch.save_file(contiguous, new / WEIGHTS, metadata={"format": "pt"})
        if card is not None:
            write_text(new / "README.md", card)
