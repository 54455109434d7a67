"""What TransformerLens 4.3 does wrong with some architectures: mended or refused here."""

from functools import partial
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import PositionEmbeddingsAttentionBridge
from transformers import PretrainedConfig

from eigenlens.matrices import UnsupportedModelError

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


def mend_rotary_dtype(model: TransformerBridge) -> None:
    """Bring rotated queries and keys back to the type of the weights, as transformers does.

    OLMo rotates in float32. TransformerLens goes on in float32 and then multiplies with values of
    half precision, which fails without a cache and rounds differently with one.
    """
    for module in model.modules():
        if isinstance(module, PositionEmbeddingsAttentionBridge) and "o" in module.submodules:
            for name in ("hook_rot_q", "hook_rot_k"):
                point = getattr(module, name, None)
                if isinstance(point, HookPoint) and point not in _mended:
                    point.register_forward_hook(partial(_as_weight, module.o))
                    _mended.add(point)


def _as_weight(
    linear: nn.Module, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    dtype: torch.dtype = linear.weight.dtype  # type: ignore[assignment]
    return output.to(dtype) if dtype.is_floating_point else output
