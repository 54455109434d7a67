"""What TransformerLens 4.3 and transformers do wrong with some models: mended or refused here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import PositionEmbeddingsAttentionBridge
from transformer_lens.model_bridge.sources.transformers import helpers
from transformer_lens.utilities import quantization
from transformers import PretrainedConfig, PreTrainedModel

from eigenlens.blocks import UnsupportedModelError

_mended: WeakSet[nn.Module] = WeakSet()


def refuse_unsupported(config: PretrainedConfig) -> None:
    """Raise for configurations that no bridge computes rightly.

    Raises:
        UnsupportedModelError: says what is not supported.
    """
    name = (config.architectures or [type(config).__name__])[0]
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; eigenlens needs a causal language model."
        )
    new_falcon = config.model_type == "falcon" and config.new_decoder_architecture
    if new_falcon and config.num_kv_heads != 1:
        # The rows of a group's queries, key and value lie together, group after group.
        raise UnsupportedModelError(
            f"Falcon with new_decoder_architecture and {config.num_kv_heads} key/value heads is "
            "not supported: TransformerLens splits its joint matrix of queries, keys and values "
            "wrongly. Falcon models with one key/value head are supported."
        )


def mend_experts_dtype(model: PreTrainedModel) -> None:
    """Let transformers multiply experts one by one in float64: it has no grouped product there."""
    if next(model.parameters()).dtype == torch.float64:
        model.set_experts_implementation("eager")


@contextmanager
def no_installs() -> Iterator[None]:
    """Keep TransformerLens from running pip.

    Where a model that sees comes without a processor, it installs torchvision, and with it another
    build of torch, into the running environment. Texts need no processor.
    """
    usual = helpers._ensure_torchvision
    helpers._ensure_torchvision = lambda: False
    try:
        yield
    finally:
        helpers._ensure_torchvision = usual


@contextmanager
def weights_on_paper() -> Iterator[None]:
    """Let TransformerLens cut joint weights that are on the meta device, which have no values."""
    usual = quantization.unreadable_weight_reason
    quantization.unreadable_weight_reason = lambda weight: None
    try:
        yield
    finally:
        quantization.unreadable_weight_reason = usual


def mend_rotary_dtype(model: TransformerBridge) -> None:
    """Bring rotated queries and keys back to the type of the stream, as transformers does.

    OLMo rotates in float32. TransformerLens goes on in float32 and then multiplies with values of
    half precision, which fails without a cache and rounds differently with one.
    """
    for module in model.modules():
        if isinstance(module, PositionEmbeddingsAttentionBridge) and module not in _mended:
            stream = _StreamType()
            module.register_forward_pre_hook(stream.note, with_kwargs=True)
            for name in ("hook_rot_q", "hook_rot_k"):
                if isinstance(point := getattr(module, name, None), HookPoint):
                    point.register_forward_hook(stream.restore)
            _mended.add(module)


class _StreamType:
    """The type of what an attention reads, given to what it rotates."""

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._dtype = (args[0] if args else kwargs["hidden_states"]).dtype

    def restore(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.to(self._dtype)
