"""Models of real sizes with random weights, for time and memory, which do not depend on values.

1. The model is laid out on the meta device, where it takes no memory.
2. Its parameters are dealt out to shards, in their order.
3. Shard by shard, each module is filled on the CPU by the model's own initialisation, from a seed
   of its own, and written: memory stays at one shard, and a shard that is there is not made again.
4. A tokenizer of bytes, padded to the model's vocabulary, and the configuration come last: without
   them the folder is no model yet.
"""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from eigenlens.files import atomic_path, read_json, write_json
from eigenlens.provenance import text_hash

SHARD = 500_000_000  # bytes
_INDEX = "model.safetensors.index.json"
_KEY = "eigenlens"
_END = "<|endoftext|>"


def make_model(
    config: PretrainedConfig,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_bytes: int = SHARD,
    progress: bool = True,
) -> bool:
    """Write a model of random weights that transformers can open, unless it is there.

    Args:
        config: its configuration.
        folder: where it goes.
        dtype: of the weights.
        seed: of the weights.
        shard_bytes: at most so many in a file, and in memory, unless one tensor has more.
        progress: show a progress bar.

    Returns:
        Whether anything had to be written.

    Raises:
        ValueError: the folder holds another model; a vocabulary too small for bytes.
        UnwritableError: no room, or no right to write there.
    """
    model = laid_out(config, dtype)
    _check_vocabulary(config)
    key = text_hash([config.to_json_string(use_diff=True), str(dtype), seed, shard_bytes])
    if (folder / "config.json").is_file():
        if not (folder / _INDEX).is_file() or read_json(folder / _INDEX)["metadata"][_KEY] != key:
            raise ValueError(f"{folder} holds another model: choose another folder.")
        return False
    shards = _dealt(model, shard_bytes)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(
        names, tqdm(shards, desc="make", unit="shard", disable=not progress), strict=True
    ):
        if not _has(folder / name, key):
            tensors = {full: _filled(model, full, seed) for full in shard}
            with atomic_path(folder / name) as temporary:
                metadata = {"format": "pt", _KEY: key}
                safetensors.torch.save_file(tensors, temporary, metadata=metadata)
    where = {full: name for name, shard in zip(names, shards, strict=True) for full in shard}
    total = sum(_bytes(parameter) for parameter in model.parameters())
    index = {"metadata": {"total_size": total, _KEY: key}, "weight_map": where}
    write_json(folder / _INDEX, index)
    byte_tokenizer(config.vocab_size).save_pretrained(folder)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    with atomic_path(folder / "config.json") as temporary:
        config.to_json_file(temporary)
    return True


def laid_out(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration on the meta device: all of its shapes, and no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def byte_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, with names that no text spells up to a vocabulary's size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = [f"<|unused_{i}|>" for i in range(size - len(alphabet) - 1)]
    words = {word: i for i, word in enumerate([*alphabet, _END, *unused])}
    core = Tokenizer(models.BPE(vocab=words, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=_END, eos_token=_END, pad_token=_END
    )


def _check_vocabulary(config: PretrainedConfig) -> None:
    if config.vocab_size < 257:
        raise ValueError(
            f"A vocabulary of {config.vocab_size} has no room for 256 bytes and an end of text."
        )


def _dealt(model: nn.Module, shard_bytes: int) -> list[list[str]]:
    """Names of the parameters of each shard; tied ones once."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, parameter in model.named_parameters():
        if shards[-1] and _bytes(parameter) > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= _bytes(parameter)
    return shards


def _bytes(parameter: Tensor) -> int:
    return math.prod(parameter.shape) * parameter.dtype.itemsize


def _has(path: Path, key: str) -> bool:
    if not path.is_file():
        return False
    with safetensors.safe_open(path, framework="pt") as file:
        metadata: dict[str, Any] = file.metadata() or {}
    return metadata.get(_KEY) == key


def _filled(model: PreTrainedModel, full: str, seed: int) -> Tensor:
    """One parameter as its model initialises it, from a seed that depends on its name alone."""
    path, _, leaf = full.rpartition(".")
    own = model.get_submodule(path)
    alone = nn.Module.__new__(type(own))
    alone.__dict__ = {**own.__dict__, "_modules": {}}
    alone = deepcopy(alone).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int(text_hash([seed, full])[:15], 16))
        for parameter in alone.parameters():
            parameter.zero_()
        model._init_weights(alone)
    return getattr(alone, leaf).detach()
