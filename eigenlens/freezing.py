"""Freezing: make the effect of chosen components independent of the input.

Component i is a coordinate ``c_i`` of one activation; frozen with strength z it becomes
``c_i + z (c̄_i − c_i)`` (:func:`eigenlens.spectra.freeze_coordinates`): mean ablation, position by
position. z = 1 freezes, 0 < z < 1 attenuates. Positions are counted from the end of the prompt; a
position that calibration never saw gets the mean over positions.

A constant added to every key shifts all attention scores of a query alike and cancels in the
softmax unless keys are rotated: without rotary embeddings, freezing components of ``W_K`` equals
deleting them wherever the mean does not depend on the position.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.far_side import zero_coordinates
from eigenlens.frozen_set import FrozenSet
from eigenlens.position_means import Positions
from eigenlens.positions import PositionTracker, add_hook, attach_tracker
from eigenlens.spectra import Directions, by_matrix, freeze_coordinates


class Freeze:
    """An edit of a model through hooks: on inside ``with``, or from ``apply()`` to ``undo()``.

    With ``bias_only`` the means are added but nothing is taken away: a control that tells how much
    of an effect is the bias.
    """

    def __init__(
        self, model: TransformerBridge, frozen: FrozenSet, *, bias_only: bool = False
    ) -> None:
        self._model = model
        self._frozen = frozen
        directions = frozen.directions_on(model)
        self._edits = [
            _SiteEdit.of(model, frozen, directions[name], rows, bias_only)
            for name, rows in by_matrix(frozen.components).items()
        ]
        self._undo: list[Callable[[], None]] = []

    def apply(self) -> "Freeze":
        """Put the hooks on; they survive ``model.reset_hooks()``."""
        if self._undo:
            raise RuntimeError("This edit is applied already; call undo() first.")
        try:
            if self._edits:
                tracker, release = attach_tracker(self._model)
                self._undo.append(release)
            for edit in self._edits:
                self._undo.append(edit.attach(self._model, tracker))
        except BaseException:
            self.undo()
            raise
        return self

    def undo(self) -> None:
        """Take the hooks off; the model is as it was, bit for bit."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "Freeze":
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        what = f"{len(self._frozen):,} components {self._frozen.edit}"
        if self._undo:
            return f"<{what}: on now; undo() takes the edit off>"
        return (
            f"<{what}: NOT applied. Use `with eigenlens.freeze(model, frozen): …`, or "
            "freeze(model, frozen, permanent=True)>"
        )


def freeze(model: TransformerBridge, frozen: FrozenSet, *, permanent: bool = False) -> Freeze:
    """Freeze components of a model.

    ``with freeze(model, frozen): …`` edits the model inside the block and restores it afterwards,
    also after an exception. With ``permanent=True`` the edit is on at once and stays until
    ``undo()`` of the returned object.

    Args:
        model: the model that ``frozen`` was made for, or another object with the same weights.
        frozen: components, strengths and mean coordinates.
        permanent: apply now.

    Raises:
        WrongModelError: ``frozen`` belongs to other weights.
    """
    edit = Freeze(model, frozen)
    return edit.apply() if permanent else edit


@dataclass(frozen=True)
class _SiteEdit:
    """The edit of one activation: ``table`` holds means by row of ``positions``."""

    directions: Directions
    table: Float[Tensor, "row 1 k"]
    strength: Float[Tensor, "1 k"]
    positions: Positions

    @classmethod
    def of(
        cls,
        model: TransformerBridge,
        frozen: FrozenSet,
        directions: Directions,
        rows: np.ndarray,
        bias_only: bool,
    ) -> "_SiteEdit":
        write = directions.write
        assert directions.read is not None
        assert write is not None
        table = torch.tensor(frozen.means[rows].table()).T[:, None].to(write)
        strength = torch.tensor(frozen.components["strength"].to_numpy()[None, rows]).to(write)
        if bias_only:  # coordinates of outputs hold the bias of the map, which is there already
            table = table - zero_coordinates(model, directions)
            directions = replace(directions, read=torch.zeros_like(directions.read))
        return cls(directions, table, strength, frozen.means.positions)

    def attach(self, model: TransformerBridge, tracker: PositionTracker) -> Callable[[], None]:
        site = self.directions.site

        def edit(value: Tensor, hook: Any) -> Tensor:
            mean = self.table[self.positions.rows(tracker.positions.to(self.table.device))]
            h = site.split(value, tracker.positions.shape[-1])
            return freeze_coordinates(h, self.directions, mean, self.strength).reshape(value.shape)

        return add_hook(model.hook_dict[site.hook], edit)
