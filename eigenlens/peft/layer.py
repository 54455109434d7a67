"""A linear map with eigenpruning adapters: ``y + (t + x D) U``.

The formula is that of :mod:`eigenlens.export.low_rank`, with one ``t`` for each position.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from eigenlens.export.low_rank import LowRank
from eigenlens.export.weights import apply_change
from eigenlens.position_means import Positions
from eigenlens.positions import PositionTracker


class EigenpruneLinear(nn.Module, BaseTunerLayer):
    """Wraps an ``nn.Linear`` or ``Conv1D``."""

    adapter_layer_names = ("eigenprune_down", "eigenprune_up", "eigenprune_table")
    other_param_names = ("positions",)
    # What the untyped BaseTunerLayer brings.
    active_adapters: list[str]
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, tracker: PositionTracker) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.eigenprune_down = nn.ParameterDict()
        self.eigenprune_up = nn.ParameterDict()
        self.eigenprune_table = nn.ParameterDict()
        self.positions: dict[str, Positions] = {}
        self.merged_adapters: list[str] = []
        self._tracker = tracker
        self._unmerged: dict[str, nn.Parameter | None] = {}

    def add(self, name: str, shape: list[int], positions: Positions, *, inference: bool) -> None:
        """An adapter of zeros, to be filled from a file."""
        n_in, k, n_out = shape
        weight = self.get_base_layer().weight
        assert isinstance(weight, Tensor)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.positions[name] = positions
        self.eigenprune_down[name] = nn.Parameter(torch.zeros(n_in, k, dtype=dtype))
        self.eigenprune_up[name] = nn.Parameter(torch.zeros(k, n_out, dtype=dtype))
        table = torch.zeros(len(positions) + 1, k, dtype=dtype)
        self.eigenprune_table[name] = nn.Parameter(table)
        self._move_adapter_to_device_of_base_layer(name)
        self.set_adapter(self.active_adapters, inference_mode=inference)

    def change(self, name: str) -> LowRank:
        """The change that an adapter makes."""
        parts = (self.eigenprune_down, self.eigenprune_up, self.eigenprune_table)
        return LowRank(*(part[name].detach() for part in parts))

    @property
    def active_here(self) -> list[str]:
        """Active adapters that edit this map."""
        return [name for name in self.active_adapters if name in self.eigenprune_down]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The map, and what its active adapters add."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_here:
            y = y + self._added(name, x).to(y.dtype).reshape(y.shape)
        return y

    def _added(self, name: str, x: Tensor) -> Tensor:
        down, up = self.eigenprune_down[name], self.eigenprune_up[name]
        here = self._tracker.positions.to(x.device)
        mean = self.eigenprune_table[name][self.positions[name].rows(here)]
        h = x.reshape(-1, here.shape[-1], x.shape[-1]).to(down.dtype)
        return (mean + h @ down) @ up

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the change into the weights; :class:`EigenpruneModel` has checked that this can be.

        What was there is kept, so that :meth:`unmerge` is exact.
        """
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name in self.eigenprune_down:
                base = self.get_base_layer()
                if not self._unmerged:
                    self._unmerged = {part: getattr(base, part) for part in ("weight", "bias")}
                apply_change(base, self.change(name))
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put back the weights as they were."""
        for name, value in self._unmerged.items():
            setattr(self.get_base_layer(), name, value)
        self._unmerged = {}
        self.merged_adapters.clear()
