"""A transformers model and its ``TransformerBridge``: made, compared, and made ready."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from eigenlens.blocks import UnsupportedModelError
from eigenlens.errors import reason
from eigenlens.files import FileFormatError
from eigenlens.models.checks import (
    check_causal,
    check_finite,
    check_same_logits,
    is_padding_neutral,
    probe,
)
from eigenlens.models.peft_adapters import has_adapter
from eigenlens.models.placement import DeviceMap, check_in_memory
from eigenlens.models.special_tokens import kept_as_is, note_special_tokens
from eigenlens.models.upstream import (
    mend_experts_dtype,
    mend_rotary_dtype,
    no_installs,
    refuse_unsupported,
)
from eigenlens.models.weight_files import check_loaded


@dataclass(frozen=True)
class Reference:
    """What the transformers model computes, before TransformerLens has touched it."""

    name: str
    tokens: Int[Tensor, "1 pos"]
    logits: Float[Tensor, "1 pos d_vocab"]

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Reference":
        """One pass over a few tokens.

        Raises:
            UnsupportedModelError: a model that does not turn tokens into logits.
            ValueError: weights that are no numbers.
        """
        check_finite(model)
        mend_experts_dtype(model)
        name = type(model).__name__
        with _unsupported(f"{name} does not turn tokens into logits"), torch.no_grad():
            table = model.get_input_embeddings().weight
            n_ctx = getattr(model.config.get_text_config(), "max_position_embeddings", None)
            tokens = probe(len(table), n_ctx, table.device)
            return cls(name, tokens, model(tokens).logits)


@contextmanager
def _unsupported(sentence: str) -> Iterator[None]:
    """Tell whatever TransformerLens or transformers raise as one sentence of ours."""
    try:
        yield
    except (UnsupportedModelError, FileFormatError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{sentence} ({type(error).__name__}: {reason(error)})."
        ) from error


def check_architecture(config: PretrainedConfig) -> None:
    """Raise ``UnsupportedModelError`` for what TransformerLens has no bridge for."""
    refuse_unsupported(config)
    try:
        determine_architecture_from_hf_config(config)
    except ValueError as error:
        name = ", ".join(config.architectures or [config.model_type])
        raise UnsupportedModelError(f"TransformerLens has no bridge for {name}.") from error


class _Checkpoint:
    """Stands where TransformerLens expects a model class, to see what is loaded and how."""

    def __init__(self, device: torch.device | None, mapped: bool) -> None:
        self._device = device
        self._mapped = mapped
        self.reference: Reference | None = None

    def from_pretrained(self, source: str, **options: Any) -> PreTrainedModel:
        """Load as TransformerLens would, but accept no weight that is not in the files."""
        architecture = determine_architecture_from_hf_config(options["config"])
        model, info = get_hf_model_class_for_architecture(architecture).from_pretrained(
            source,
            **options,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            disable_mmap=not self._mapped,
        )
        check_loaded(info, source, type(model).__name__)
        if has_adapter(model):
            raise ValueError(f"{source} holds a peft adapter: merge it with merge_adapter=True.")
        check_in_memory(model)  # "auto" may have found too little room
        self.reference = Reference.of(model if self._device is None else model.to(self._device))
        return model


def wrap_files(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device | DeviceMap,
    *,
    mapped: bool = True,
) -> TransformerBridge:
    """The bridge of a model that lies in a folder or on the Hub.

    Args:
        source: the folder, or the name of a model of the Hub.
        tokenizer: its own.
        dtype: of the weights.
        device: where they go, all or module by module.
        mapped: weights on the CPU may stay on the disk until they are read, which ends the process
            if their files are cut short meanwhile.

    Raises:
        FileFormatError: its tensors are not those of its architecture.
        UnsupportedModelError: it is not causal, or TransformerLens does not compute it rightly.
        ValueError: weights that are no numbers.
    """
    single = device if isinstance(device, torch.device) else None
    checkpoint = _Checkpoint(single, mapped)
    where = {"device": single} if single else {"device_map": device}
    with kept_as_is(tokenizer), no_installs():
        try:
            bridge = TransformerBridge.boot_transformers(
                source, dtype=dtype, tokenizer=tokenizer, model_class=checkpoint, **where
            )
        except Exception as error:
            if checkpoint.reference is None:  # the files are to blame, not TransformerLens
                raise
            name = checkpoint.reference.name
            raise UnsupportedModelError(
                f"TransformerLens cannot wrap {name} ({reason(error)})."
            ) from error
    return ready(bridge, checkpoint.reference)


def wrap_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """The bridge around a model in memory, whose modules become the bridge's.

    Raises:
        UnsupportedModelError: it is not causal, or TransformerLens does not compute it rightly.
        ValueError: it has a bridge already; weights that are no numbers.
    """
    name = type(model).__name__
    if any(isinstance(module, GeneralizedComponent) for module in model.modules()):
        raise ValueError(f"This {name} belongs to a TransformerBridge already: give that bridge.")
    known = (c.__name__ for c in type(model).__mro__ if c.__name__ in SUPPORTED_ARCHITECTURES)
    model.config.architectures = [next(known, name)]  # as save_pretrained does; may be stale
    check_architecture(model.config)
    model.eval()
    reference = Reference.of(model)
    weight = next(model.parameters())
    cannot = _unsupported(f"TransformerLens cannot wrap this {name}")
    with kept_as_is(tokenizer), no_installs(), cannot:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, dtype=weight.dtype, device=weight.device, tokenizer=tokenizer
        )
    return ready(bridge, reference)


def ready(
    bridge: TransformerBridge,
    reference: Reference | None = None,
    published: PreTrainedTokenizerBase | None = None,
) -> TransformerBridge:
    """The bridge in eval mode, without gradients, with its tokenizer's habits noted; tried out.

    Args:
        bridge: whoever made it.
        reference: what its logits must be, where that is known.
        published: the checkpoint's own tokenizer, where the bridge has another one.

    Raises:
        UnsupportedModelError: it is not causal, or it computes other logits than transformers.
    """
    bridge.eval()
    bridge.requires_grad_(False)
    note_special_tokens(bridge, published)
    mend_rotary_dtype(bridge)
    name = reference.name if reference else type(bridge.original_model).__name__
    size = bridge.cfg.d_vocab, bridge.cfg.n_ctx, torch.device(bridge.cfg.device)
    tokens = reference.tokens if reference else probe(*size)
    with _unsupported(f"A pass through the bridge of {name} fails"):
        logits = _run(bridge, tokens)
        if reference:
            check_same_logits(logits, reference.logits, name)
        check_causal(
            lambda other: _run(bridge, other),
            tokens,
            bridge.cfg.d_vocab,
            name,
            routed=bool(getattr(bridge.cfg, "num_experts", None)),
        )
        bridge.cfg.neutral_padding = is_padding_neutral(partial(_run, bridge), *size)
    return bridge


def _run(bridge: TransformerBridge, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """The pass that evaluation makes."""
    with torch.no_grad():
        return bridge(tokens, attention_mask=mask, use_cache=False)
