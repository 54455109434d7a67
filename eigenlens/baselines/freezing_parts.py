"""Parts of freezing on their own: which of them does the work?

Freezing takes the input-dependent part of a component away and adds its mean at each position.
These controls take the components that one-shot eigenpruning chooses, or given ones, and do only
part of that to them.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from eigenlens.baselines.baseline import Search
from eigenlens.baselines.edits import FrozenEdit
from eigenlens.baselines.ranked import OneShot
from eigenlens.frozen_set import FrozenSet

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

    part: Part = "bias only"
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
            return FrozenEdit(frozen, bias_only=True, control={"part": self.part})
        return FrozenEdit(zeroed(frozen) if self.part == "zero" else position_free(frozen))


def zeroed(frozen: FrozenSet) -> FrozenSet:
    """The same components with zero in place of their means."""
    return replace(
        frozen,
        mean_activation=np.zeros_like(frozen.mean_activation),
        fallback=np.zeros_like(frozen.fallback),
    )


def position_free(frozen: FrozenSet) -> FrozenSet:
    """The same components with the mean over all positions at each of them."""
    shape = frozen.mean_activation.shape
    means = np.broadcast_to(frozen.fallback[:, None], shape).copy()
    return replace(frozen, mean_activation=means)
