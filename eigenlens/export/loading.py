"""A plain transformers model by the names that eigenlens knows, and what it writes."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eigenlens.models.checks import checked_device, checked_dtype
from eigenlens.models.known import resolve
from eigenlens.models.weight_files import check_folder, check_loaded


def load_plain(
    name: str, dtype: str, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model of transformers and its tokenizer.

    Args:
        name: a short name, a folder, a GGUF file or a Hub name.
        dtype: of its weights.
        device: where to run (default: CUDA if there is one, else the CPU).

    Raises:
        UnknownModelError, FileFormatError, ValueError: as :func:`eigenlens.load_model`.
    """
    kind, place = checked_dtype(dtype), checked_device(device)
    source = resolve(name)
    if Path(source).is_dir():
        check_folder(Path(source))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=kind,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise ValueError(
            f"Cannot load the model {name!r}: it is no short name, no folder and no GGUF file, and "
            "the Hugging Face Hub did not answer with it. Give its place with --model."
        ) from error
    check_loaded(info, source, type(model).__name__)
    place = place or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(place).eval(), tokenizer


def written_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, n_tokens: int
) -> str:
    """What a model writes after a prompt, always its most likely token, up to its context's end.

    Raises:
        ValueError: the prompt has no tokens, or leaves no room for another one.
    """
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    if not inputs["input_ids"].shape[1]:
        raise ValueError(f"The prompt {prompt!r} has no tokens.")
    n_ctx = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if n_ctx is not None:
        room = n_ctx - inputs["input_ids"].shape[1]
        if room < 1:
            raise ValueError(f"The prompt {prompt!r} fills the model's context of {n_ctx} tokens.")
        n_tokens = min(n_tokens, room)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False, pad_token_id=pad)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
