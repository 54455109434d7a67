"""``load_model``: a name, a folder, a GGUF file or a model in memory → ``TransformerBridge``.

The model comes back in eval mode with parameters that need no gradient, and with
``model.cfg.default_prepend_bos`` set to what the checkpoint's own tokenizer does (TransformerLens
would prepend a beginning-of-sequence token to every prompt). Weights are not folded or centred, so
the bridge's logits are those of the transformers model.
"""

import os
from copy import deepcopy
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError
from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_device
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from eigenlens.files import FileFormatError, cache_dir
from eigenlens.models import peft_adapters
from eigenlens.models.checks import check_finite, checked_device, checked_dtype
from eigenlens.models.known import KNOWN_MODELS, UnknownModelError, resolve
from eigenlens.models.placement import DeviceMap, check_device_map, check_in_memory
from eigenlens.models.special_tokens import as_published, give_tokenizer
from eigenlens.models.weight_files import check_folder
from eigenlens.models.wording import headline
from eigenlens.models.wrapping import check_architecture, ready, wrap_files, wrap_model


def load_model(
    model: str | os.PathLike[str] | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    merge_adapter: bool = False,
) -> TransformerBridge:
    """Load a model for analysis.

    Args:
        model: a short name of :data:`KNOWN_MODELS`, a Hub model, a folder that transformers wrote,
            or a GGUF file (dequantised once, then kept as safetensors in the user's cache); or a
            model in memory: a causal language model of transformers, which is wrapped as it is and
            belongs to the bridge from then on, or a ``TransformerBridge``, which is made ready.
        tokenizer: of a model in memory, or in place of the one that comes with a name.
        dtype: floating point type of the weights, as ``torch.dtype`` or its name (default: float32
            for a name, and what it has for a model in memory).
        device: where to run (default: CUDA if there is one, else the CPU, for a name; where it is
            for a model in memory).
        device_map: where the modules of a named model go, layer by layer: ``auto``, ``balanced``
            or ``sequential`` over the devices that are there, or their names and devices, as
            accelerate takes them. Directions, sums and edits of a layer are where the layer is.
        merge_adapter: merge the adapter of peft that is found beside a base model, in place of one,
            or around a model in memory. Without this, adapters are refused.

    Raises:
        UnknownModelError: nothing of that name is here or reachable; says what would work.
        FileFormatError: files that are damaged, lack weights, or hold tensors of another model.
        UnsupportedModelError: a model that is not causal, or that TransformerLens cannot wrap.
        ValueError: the weights hold NaN or infinite values; ``dtype`` is no float type; ``device``
            is not there; an adapter that was not asked for; a model in memory without tokenizer;
            a ``device_map`` for one, beside a ``device``, or that offloads layers to the disk.
    """
    check_device_map(device_map, device)
    wanted, place = checked_dtype(dtype), checked_device(device)
    if device_map is not None and (isinstance(model, nn.Module) or merge_adapter):
        raise ValueError(
            "device_map places a model as it is loaded by its name, without adapters: place one in "
            "memory with accelerate.dispatch_model before it is handed in."
        )
    if isinstance(model, TransformerBridge):
        return _from_bridge(model, tokenizer, wanted, place)
    if isinstance(model, nn.Module):
        return _from_memory(_without_adapter(model, merge_adapter), tokenizer, wanted, place)
    source = resolve(str(model))
    try:
        adapter = _adapter(source, merge_adapter)
        if adapter is None:
            bridge = _from_files(source, tokenizer, wanted or torch.float32, place, device_map)
        else:
            bridge = _from_adapter(adapter, tokenizer, wanted or torch.float32, place)
    except (OSError, SafetensorError) as error:
        raise _unreadable(str(model), source, error) from error
    bridge.cfg.model_name = str(model)
    return bridge


def _from_files(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    device: torch.device | None,
    device_map: DeviceMap | None,
) -> TransformerBridge:
    if Path(source).is_dir():
        check_folder(Path(source))
    check_architecture(AutoConfig.from_pretrained(source))
    words = deepcopy(tokenizer) if tokenizer is not None else _tokenizer(source)
    # What is in the cache, another process may write over; what is elsewhere belongs to the user.
    mapped = cache_dir() not in Path(source).parents
    place = device_map or device or torch.device(get_device())
    return wrap_files(source, words, dtype, place, mapped=mapped)


def _tokenizer(source: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(source)
    except ValueError as error:
        raise FileFormatError(
            f"No tokenizer can be read from {source}: save it there with save_pretrained, or give "
            f"it as load_model(name, tokenizer). ({headline(error)})"
        ) from error


def _adapter(source: str, merge: bool) -> Path | None:
    """Folder of the adapter to merge, if any."""
    folder = peft_adapters.adapter_folder(source)
    if folder and not merge:
        raise ValueError(peft_adapters.refusal(folder))
    if merge and not folder:
        if not find_adapter_config_file(source):
            raise ValueError(
                f"{source} holds no {peft_adapters.CONFIG}: there is nothing to merge."
            )
        folder = Path(snapshot_download(source))
    return folder


def _from_adapter(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype,
    device: torch.device | None,
) -> TransformerBridge:
    base = resolve(peft_adapters.base_name(folder))
    model = peft_adapters.merged_folder(folder, base, dtype)
    if tokenizer is None:
        own = (folder / "tokenizer_config.json").is_file()
        tokenizer = _tokenizer(str(folder) if own else base)
    return _from_memory(model, tokenizer, None, device or torch.device(get_device()))


def _without_adapter(model: nn.Module, merge: bool) -> nn.Module:
    """The model itself, or what it becomes when its adapter is merged."""
    if not peft_adapters.has_adapter(model):
        if merge:
            raise ValueError(f"This {type(model).__name__} holds no peft adapter to merge.")
        return model
    if not merge:
        raise ValueError(
            f"This {type(model).__name__} holds a peft adapter: call merge_and_unload() first and "
            "give what it returns, or let load_model(..., merge_adapter=True) do so."
        )
    return peft_adapters.merged(model)


def _from_memory(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> TransformerBridge:
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"A {type(model).__name__} is no model of transformers: give a PreTrainedModel, a "
            "TransformerBridge, or the name of a model."
        )
    if tokenizer is None:
        raise ValueError("A model in memory needs its tokenizer: load_model(model, tokenizer).")
    if dtype is not None:
        _cast(model, dtype)
    check_in_memory(model)
    bridge = wrap_model(model.to(device) if device else model, deepcopy(tokenizer))
    bridge.cfg.model_name = model.config.name_or_path or type(model).__name__
    return bridge


def _from_bridge(
    bridge: TransformerBridge,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> TransformerBridge:
    config = getattr(bridge.original_model, "config", None)
    if config is not None:
        check_architecture(config)
    if tokenizer is not None:
        give_tokenizer(bridge, deepcopy(tokenizer))
    if bridge.tokenizer is None:
        raise ValueError("This bridge has no tokenizer: load_model(bridge, tokenizer).")
    if dtype not in (None, next(bridge.parameters()).dtype):
        raise ValueError(f"A bridge keeps the type of its weights: make it with dtype={dtype}.")
    if device is not None:
        bridge.to(device, print_details=False)
    check_in_memory(bridge)
    check_finite(bridge)
    return ready(bridge, published=tokenizer or as_published(bridge.tokenizer))


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Change the type of the parameters alone: buffers such as rotary angles keep their own."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _unreadable(name: str, source: str, error: Exception) -> ValueError:
    """What to say when transformers could not open what was named."""
    folder = Path(source)
    if not folder.is_dir():
        cached = try_to_load_from_cache(source, "config.json")
        if isinstance(error, OSError) or not isinstance(cached, str):
            return UnknownModelError(
                f"Cannot load the model {name!r}: it is not a short name "
                f"({', '.join(sorted(KNOWN_MODELS))}), not a local folder or GGUF file, and the "
                f"Hugging Face Hub did not answer with it ({headline(error)}). A peft adapter of "
                "the Hub needs merge_adapter=True."
            )
        folder = Path(cached).parent
        check_folder(folder)
    return FileFormatError(f"Cannot read the model in {folder}: {headline(error)}")
