"""A model on its way to another process: its configuration, its tokenizer, and arrays.

A ``TransformerBridge`` itself cannot be sent: it holds hooks. Its numbers go as arrays, which may
lie in memory that processes share; who unpacks them gets a copy of its own.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from eigenlens.models.special_tokens import kept_as_is
from eigenlens.models.upstream import mend_experts_dtype, mend_rotary_dtype, no_installs
from eigenlens.provenance import model_fingerprint


@dataclass(frozen=True)
class PackedModel:
    """Everything that a model on the CPU is, without the model.

    Attributes:
        kind: its class in transformers.
        config: that of transformers.
        tokenizer: its own.
        arrays: parameters and buffers by name, as bytes.
        dtype: of its weights.
        settings: what ``model.cfg`` says.
        fingerprint: of its weights.
    """

    kind: type[PreTrainedModel]
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    arrays: dict[str, np.ndarray]
    dtype: torch.dtype
    settings: dict[str, Any]
    fingerprint: str

    @classmethod
    def of(cls, model: TransformerBridge) -> "PackedModel":
        """Pack a model.

        Raises:
            ValueError: it is not one of transformers, not on the CPU, or has hooks, which cannot
                be sent along.
        """
        inner = model.original_model
        if not isinstance(inner, PreTrainedModel) or model.tokenizer is None:
            raise ValueError(
                f"A {type(inner).__name__} cannot be sent to other processes: only models of "
                "transformers with a tokenizer can."
            )
        devices = {str(parameter.device) for parameter in model.parameters()}
        if devices != {"cpu"}:
            raise ValueError(
                f"The model is on {', '.join(sorted(devices))}, and other processes work on the "
                "CPU: load it with device='cpu', or leave shards out."
            )
        hooked = [
            m for m in model.modules() if isinstance(m, HookPoint) and m.fwd_hooks + m.bwd_hooks
        ]
        if hooked:
            raise ValueError(
                f"The model has hooks (at {hooked[0].name}), as inside el.freeze: these cannot be "
                "sent to other processes. Take them off, or leave shards out."
            )
        return cls(
            type(inner),
            inner.config,
            model.tokenizer,
            {name: _bytes(tensor) for name, tensor in _tensors(inner).items()},
            next(inner.parameters()).dtype,
            dict(vars(model.cfg)),
            model_fingerprint(model),
        )

    def unpack(self) -> TransformerBridge:
        """The same model.

        Raises:
            ValueError: it turns out to be another one.
        """
        with no_init_weights(), torch.random.fork_rng(devices=[]):
            inner = self.kind._from_config(self.config, dtype=self.dtype)
        inner.tie_weights()
        mend_experts_dtype(inner)
        with kept_as_is(self.tokenizer), no_installs():
            bridge = TransformerBridge.boot_transformers(
                self.kind.__name__,
                hf_model=inner,
                dtype=self.dtype,
                device="cpu",
                tokenizer=self.tokenizer,
            )
        bridge.eval()
        bridge.requires_grad_(False)
        with torch.no_grad():
            for name, tensor in _tensors(inner).items():
                own = torch.from_numpy(self.arrays[name].copy())
                tensor.copy_(own.view(tensor.dtype).reshape(tensor.shape))
        vars(bridge.cfg).update(self.settings)
        mend_rotary_dtype(bridge)
        if model_fingerprint(bridge) != self.fingerprint:
            raise ValueError(
                f"{self.settings.get('model_name')} has other weights once it is sent: leave "
                "shards out."
            )
        return bridge


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _bytes(tensor: Tensor) -> np.ndarray:
    flat: np.ndarray = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat
