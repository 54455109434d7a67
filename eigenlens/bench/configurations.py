"""Configurations of real models, written down: their files may be out of reach.

After the papers and model cards of GPT-2, Phi-2, LLaMA and Llama 2; the tests hold the number of
parameters that follows against the published one.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from eigenlens.files import FileFormatError, read_json
from eigenlens.models.known import KNOWN_MODELS, UnknownModelError, resolve

_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "rms_norm_eps": 1e-5}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2-xl": {
        "model_type": "gpt2",
        "n_layer": 48,
        "n_embd": 1600,
        "n_head": 25,
        "vocab_size": 50257,
        "n_positions": 1024,
    },
    "phi-2": {
        "model_type": "phi",
        "num_hidden_layers": 32,
        "hidden_size": 2560,
        "num_attention_heads": 32,
        "intermediate_size": 10240,
        "vocab_size": 51200,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.4,
        },
        "max_position_embeddings": 2048,
    },
    "llama-7b": {
        **_LLAMA,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
    },
    "llama-70b": {
        **_LLAMA,
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "intermediate_size": 28672,
        "max_position_embeddings": 4096,
    },
}


def configuration(name: str) -> PretrainedConfig:
    """The configuration of that name, of a model that is here, or in a JSON file.

    Raises:
        ValueError: nothing of the kind, or none that transformers knows.
    """
    if name in CONFIGURATIONS:
        return _made(name, CONFIGURATIONS[name])
    path = Path(name).expanduser()
    folder = model_folder(name)
    if folder is not None:
        path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"There is no configuration {name!r}: give one of {', '.join(CONFIGURATIONS)}, a short "
            "name of a model that is here, its folder, or a JSON file such as its config.json."
        )
    return _made(str(path), read_json(path))


def model_folder(name: str) -> Path | None:
    """The folder of a model that is on this machine, by its path or short name."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    if name in KNOWN_MODELS:
        with suppress(UnknownModelError):
            found = Path(resolve(name))
            return found if found.is_dir() else None
    return None


def _made(name: str, values: dict[str, Any]) -> PretrainedConfig:
    kind = values.get("model_type")
    # A tokenizer of bytes has its own special tokens: those of the model it is named after may lie
    # outside a smaller vocabulary.
    free = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    try:
        rest = {key: value for key, value in values.items() if key != "model_type"}
        return AutoConfig.for_model(kind, **{**rest, **free})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise FileFormatError(f"{name} is no configuration of a model ({error}).") from error
