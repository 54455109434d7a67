"""What a norm does to a direction, up to the scale of the run: ``γ ∘ v``, centred if it centres.

The division by ``scale_t`` is left out: it depends on the input, and one positive factor per
position changes no direction.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.matrices import WeightMatrix

_ATTENTION = ("W_Q", "W_K", "W_V", "W_O")


@dataclass(frozen=True)
class NormGain:
    """The linear part of a norm at scale one.

    Attributes:
        weight: γ per channel (one plus the stored offset where a family stores that), or ``None``.
        centres: whether the mean over channels is taken off first (LayerNorm).
    """

    weight: Tensor | None = None
    centres: bool = False

    def __call__(self, vectors: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """Directions after the norm."""
        if self.centres:
            vectors = vectors - vectors.mean(-1, keepdim=True)
        return vectors if self.weight is None else vectors * self.weight.to(vectors)


def gain_before(model: TransformerBridge, matrix: WeightMatrix) -> NormGain:
    """The norm between the residual stream and a map that reads it.

    Blocks with one norm only (GPT-J, Phi, Falcon) feed attention and MLP from it.
    """
    block = model.blocks[matrix.layer]
    own = "ln1" if matrix.kind in _ATTENTION else "ln2"
    return _gain(getattr(block, own, None) or getattr(block, "ln1", None))


def gain_after(model: TransformerBridge, matrix: WeightMatrix) -> NormGain:
    """The norm between a map that writes the residual stream and the stream (Gemma 2 and 3)."""
    block = model.blocks[matrix.layer]
    own = "ln1_post" if matrix.kind in _ATTENTION else "ln2_post"
    return _gain(getattr(block, own, None))


def final_gain(model: TransformerBridge) -> NormGain:
    """The norm before the unembedding."""
    return _gain(getattr(model, "ln_final", None))


def _gain(norm: Any) -> NormGain:
    inner = getattr(norm, "original_component", None)
    if inner is None or isinstance(inner, torch.nn.Identity):
        return NormGain()
    weight = getattr(inner, "weight", None)
    if weight is not None and norm.uses_weight_offset:
        weight = 1 + weight
    return NormGain(weight, centres=not norm.uses_rms_norm)
