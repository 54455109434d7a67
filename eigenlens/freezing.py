"""Freezing: make the effect of chosen components independent of the input.

Component i is a coordinate ``c_i`` of one activation; frozen with strength z it becomes
``c_i + z (c̄_i − c_i)`` (:func:`eigenlens.spectra.freeze_coordinates`): mean ablation, position by
position. z = 1 freezes, 0 < z < 1 attenuates. Positions are counted from the end of the prompt; a
position that calibration never saw gets the mean over positions.

A constant added to every key shifts all attention scores of a query alike and cancels in the
softmax unless keys are rotated: without rotary embeddings, freezing components of ``W_K`` equals
deleting them wherever the mean does not depend on the position.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigenlens.bridges import TransformerBridge
from eigenlens.far_side import zero_coordinates
from eigenlens.frozen_set import FrozenSet, check_frozen
from eigenlens.position_means import Positions
from eigenlens.positions import PositionTracker, add_hook, attach_tracker
from eigenlens.spectra import Directions, by_matrix, freeze_coordinates, moved_coordinates

E = TypeVar("E", bound="Edit")


@dataclass(frozen=True)
class SiteEdit:
    """The edit of one activation: ``table`` holds means by row of ``positions``."""

    directions: Directions
    table: Float[Tensor, "row 1 k"]
    strength: Float[Tensor, "1 k"]
    positions: Positions

    def bias_only(self, model: TransformerBridge) -> "SiteEdit":
        """The means are added, and nothing is taken away."""
        read = self.directions.read
        assert read is not None
        # Coordinates of outputs hold the bias of the map, which is there already.
        table = self.table - zero_coordinates(model, self.directions)
        return replace(
            self, table=table, directions=replace(self.directions, read=torch.zeros_like(read))
        )

    def edited(self, value: Tensor, tracker: PositionTracker) -> Tensor:
        """The activation with its components frozen, in the layout that it came in."""
        return self._of(freeze_coordinates, value, tracker).reshape(value.shape)

    def moved(self, value: Tensor, tracker: PositionTracker) -> Float[Tensor, "batch pos 1 k"]:
        """How far freezing moves each coordinate of the activation."""
        return self._of(moved_coordinates, value, tracker)

    def _of(
        self, formula: Callable[..., Tensor], value: Tensor, tracker: PositionTracker
    ) -> Tensor:
        mean = self.table[self.positions.rows(tracker.positions.to(self.table.device))]
        h = self.directions.site.split(value, tracker.positions.shape[-1])
        return formula(h, self.directions, mean, self.strength)


def site_edits(frozen: FrozenSet, directions: Mapping[str, Directions]) -> dict[str, SiteEdit]:
    """The edits that make up ``frozen``, by site, each where its directions are."""
    edits = {}
    for name, rows in by_matrix(frozen.components).items():
        like = directions[name].write
        assert like is not None
        table = torch.tensor(frozen.means[rows].table()).T[:, None].to(like)
        strength = torch.tensor(frozen.components["strength"].to_numpy()[None, rows]).to(like)
        edits[name] = SiteEdit(directions[name], table, strength, frozen.means.positions)
    return edits


class Edit(ABC):
    """Hooks that edit a model: on inside ``with``, or from ``apply()`` to ``undo()``."""

    _hint: str

    def __init__(self, model: nn.Module, frozen: FrozenSet) -> None:
        check_frozen(frozen)
        self._model = model
        self._frozen = frozen
        self._undo: list[Callable[[], None]] = []

    @abstractmethod
    def _hooks(self, tracker: PositionTracker) -> Iterator[Callable[[], None]]:
        """Put the hooks on one by one; each function takes one off again."""

    def apply(self: E) -> E:
        """Put the hooks on."""
        if self._undo:
            raise RuntimeError("This edit is applied already; call undo() first.")
        try:
            if len(self._frozen):
                tracker, release = attach_tracker(self._model)
                self._undo.append(release)
                self._undo.extend(self._hooks(tracker))
        except BaseException:
            self.undo()
            raise
        return self

    def undo(self) -> None:
        """Take the hooks off; the model is as it was, bit for bit."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self: E) -> E:
        return self.apply()

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        what = f"{len(self._frozen):,} components {self._frozen.edit}"
        if self._undo:
            return f"<{what}: on now; undo() takes the edit off>"
        return f"<{what}: NOT applied. {self._hint}>"


class Freeze(Edit):
    """An edit of a bridge, whose hooks survive ``model.reset_hooks()``.

    With ``bias_only`` the means are added but nothing is taken away: a control that tells how much
    of an effect is the bias.
    """

    _model: TransformerBridge
    _hint = (
        "Use `with eigenlens.freeze(model, frozen): …`, or freeze(model, frozen, permanent=True)"
    )

    def __init__(
        self,
        model: TransformerBridge,
        frozen: FrozenSet,
        *,
        bias_only: bool = False,
        allow_dtype: bool = False,
    ) -> None:
        super().__init__(model, frozen)
        directions = frozen.directions_on(model, allow_dtype=allow_dtype)
        self._edits = list(site_edits(frozen, directions).values())
        if bias_only:
            self._edits = [edit.bias_only(model) for edit in self._edits]

    def _hooks(self, tracker: PositionTracker) -> Iterator[Callable[[], None]]:
        for edit in self._edits:

            def hook(value: Tensor, hook: Any, edit: SiteEdit = edit) -> Tensor:
                return edit.edited(value, tracker)

            yield add_hook(self._model.hook_dict[edit.directions.site.hook], hook)


def freeze(
    model: TransformerBridge,
    frozen: FrozenSet,
    *,
    permanent: bool = False,
    allow_dtype: bool = False,
) -> Freeze:
    """Freeze components of a model.

    ``with freeze(model, frozen): …`` edits the model inside the block and restores it afterwards,
    also after an exception. With ``permanent=True`` the edit is on at once and stays until
    ``undo()`` of the returned object.

    Args:
        model: the model that ``frozen`` was made for, or another object with the same weights.
        frozen: components, strengths and mean coordinates.
        permanent: apply now.
        allow_dtype: the model may hold the same weights in another type, such as bfloat16, compared
            as rounded to the coarser one; needs the directions, and a new evaluation.

    Raises:
        WrongModelError: ``frozen`` belongs to other weights.
    """
    edit = Freeze(model, frozen, allow_dtype=allow_dtype)
    return edit.apply() if permanent else edit
