"""Parts of freezing on their own: which of them does the work?

Freezing takes the input-dependent part of a component away and adds its mean at each position.
These controls take the components that one-shot eigenpruning chooses, or given ones, and do only
part of that to them.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.baseline import Search
from eigenlens.baselines.edits import FrozenEdit
from eigenlens.baselines.ranked import OneShot
from eigenlens.far_side import zero_coordinates
from eigenlens.frozen_set import FrozenSet
from eigenlens.position_means import PositionMeans
from eigenlens.spectra import by_matrix

Part = Literal["bias only", "zero", "position-free"]


@dataclass(frozen=True)
class FreezingPart(OneShot):
    """One-shot eigenpruning with part of a freeze.

    Attributes:
        part: ``bias only`` adds the mean and keeps the weights; ``zero`` takes the component away
            and adds nothing; ``position-free`` adds the mean over all positions everywhere.
        like: the components, in one or several sets; those of one-shot eigenpruning if none are
            given.
    """

    part: Part | str = "bias only"
    like: tuple[FrozenSet, ...] = ()

    def __post_init__(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"part={self.part!r}: choose from {', '.join(get_args(Part))}.")

    @property
    def name(self) -> str:
        """The part."""
        return f"{self.part}, {self.criterion}"

    def sets(self, search: Search) -> dict[float, FrozenSet]:
        """The given components, or what each budget freezes."""
        return {f.fraction: f for f in self.like} or super().sets(search)

    def edit(self, frozen: FrozenSet, search: Search) -> FrozenEdit:
        """The part of a freeze of ``frozen``."""
        if self.part == "bias only":
            return FrozenEdit(frozen, bias_only=True)
        if self.part == "zero":
            return FrozenEdit(zeroed(search.model, frozen))
        return FrozenEdit(frozen.shared())


def zeroed(model: TransformerBridge, frozen: FrozenSet) -> FrozenSet:
    """The same components at the coordinates of zero input, which take away and add nothing."""
    directions = frozen.directions_on(model)
    value = np.zeros(len(frozen), frozen.means.fallback.dtype)
    for name, rows in by_matrix(frozen.components).items():
        value[rows] = zero_coordinates(model, directions[name])[0].cpu().numpy()
    return replace(frozen, means=PositionMeans.constant(value))
