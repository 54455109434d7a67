"""One trained vector: a bias at the end of the residual stream.

The smallest trained edit that there is: how much of a gain does it take no direction to explain?
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.baseline import Search
from eigenlens.baselines.edits import BiasEdit, adding
from eigenlens.baselines.training import Trainable, Trained


class TrainableBias(Trainable):
    """A vector added at a hook, zero at first."""

    def __init__(self, model: TransformerBridge, hook: str, width: int) -> None:
        weight = next(model.parameters())
        self.hook = hook
        # Adam's small steps would round to nothing in half precision.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.bias = torch.zeros(width, device=weight.device, dtype=dtype)
        self.bias.requires_grad_(True)

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The vector."""
        return [self.bias]

    def live(self, model: TransformerBridge) -> AbstractContextManager[None]:
        """Add the vector."""
        return adding(model, self.hook, self.bias)

    def edit(self) -> BiasEdit:
        """The vector as it is now."""
        return BiasEdit({"bias": self.bias.detach().clone()}, {"hook": self.hook})


@dataclass(frozen=True)
class LastLayerBias(Trained):
    """Trains a vector that is added to the output of the last block."""

    name: str = "last-layer bias"

    def trainables(self, search: Search) -> Iterator[tuple[dict[str, Any], Trainable]]:
        """One vector of width d_model."""
        hook = f"blocks.{len(search.model.blocks) - 1}.hook_out"
        yield {}, TrainableBias(search.model, hook, search.model.cfg.d_model)
