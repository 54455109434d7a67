"""``attach``: an edit in a plain transformers model, by hooks of PyTorch.

One hook per activation, as in a bridge: on the input of a map before it runs, or on its output.
Where the plain model makes several maps with one matrix, an output is some of that matrix's output
features; and an input that they share must stay as it is for the others, so that what freezing adds
to it goes through the map's own part of the matrix and is added to that part's output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eigenlens.blocks import UnsupportedModelError
from eigenlens.export.plain import check_plain
from eigenlens.freezing import Edit, SiteEdit, site_edits
from eigenlens.frozen_set import FrozenSet, UnplacedError, WrongModelError, check_frozen
from eigenlens.places import Place
from eigenlens.positions import PositionTracker
from eigenlens.spectra import Directions


def attach(
    model: nn.Module,
    frozen: FrozenSet,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_dtype: bool = False,
) -> "Attachment":
    """Put an edit on a plain transformers model, until ``undo()`` or the end of a ``with`` block.

    TransformerLens is not needed where ``frozen`` holds its directions, as after a search, or read
    from a file of ``save(path, directions=True)``; otherwise it is decomposed again.

    ``generate`` counts positions from the end of the prompt in whatever way it decodes. A pass over
    prompt and answer together needs :func:`eigenlens.positions.prompt_ends_at`.

    Args:
        model: a causal language model of transformers, with the weights that ``frozen`` was made
            for.
        frozen: components, strengths and mean coordinates.
        tokenizer: refuse it unless its tokens are those that ``frozen`` was made with.
        allow_dtype: as for :func:`eigenlens.freeze`.

    Raises:
        WrongModelError: ``frozen`` belongs to other weights, or to another tokenizer.
        ValueError: no plain model of transformers.
        UnsupportedModelError: a map that the plain model does not have; without directions in
            ``frozen``, a model that TransformerLens has no bridge for.
    """
    check_frozen(frozen)
    if tokenizer is not None:
        frozen.check_tokenizer(tokenizer)
    return Attachment(model, frozen, allow_dtype=allow_dtype).apply()


class Attachment(Edit):
    """An edit of a plain transformers model."""

    _hint = "Call apply()"

    def __init__(self, model: nn.Module, frozen: FrozenSet, *, allow_dtype: bool = False) -> None:
        super().__init__(model, frozen)
        self._edits = plain_edits(model, frozen, allow_dtype=allow_dtype)

    def __enter__(self) -> "Attachment":
        return self if self._undo else self.apply()

    def _hooks(self, tracker: PositionTracker) -> Iterator[Callable[[], None]]:
        for edit in self._edits:
            yield edit.attach(self._model, tracker)


def plain_edits(
    model: nn.Module, frozen: FrozenSet, *, allow_dtype: bool = False
) -> list["PlainEdit"]:
    """The edits that make up ``frozen``, where a plain model has them.

    Raises:
        WrongModelError, ValueError, UnsupportedModelError: as :func:`attach`.
    """
    check_plain(model)
    assert isinstance(model, PreTrainedModel)
    directions = _directions(model, frozen, allow_dtype)
    return [PlainEdit.of(edit, model) for edit in site_edits(frozen, directions).values()]


def _directions(
    model: PreTrainedModel, frozen: FrozenSet, allow_dtype: bool
) -> dict[str, Directions]:
    """Directions with their places in the plain model.

    An edit that carries none is decomposed again; and only TransformerLens can tell whether weights
    are the same that it has changed.
    """
    try:
        return frozen.directions_in(model, allow_dtype=allow_dtype)
    except (UnplacedError, WrongModelError) as error:
        try:
            from eigenlens.export.around import bridge_around
        except ImportError:
            raise error from None
    bridge = bridge_around(model)
    found = frozen.directions_on(bridge, allow_dtype=allow_dtype)
    for name, own in found.items():
        weight = own.site.find(bridge).flat_weight
        if own.place is None or not torch.equal(own.place.weight(model), weight):
            raise UnsupportedModelError(
                f"{name} is no linear map of the plain transformers model: its edit lives in "
                "TransformerLens only."
            )
    return found


@dataclass(frozen=True)
class PlainEdit:
    """The edit of one activation of a plain model.

    Attributes:
        edit: of the activation.
        through: for inputs that several maps share: what one unit of each coordinate adds to the
            output of this one.
    """

    edit: SiteEdit
    through: Float[Tensor, "k all_out"] | None = None

    @classmethod
    def of(cls, edit: SiteEdit, model: nn.Module) -> "PlainEdit":
        """The edit of a bridge's activation where the plain model has it."""
        found = cls(edit)
        if found.place.runs is None or edit.directions.site.side == "out":
            return found
        write = edit.directions.write
        assert write is not None
        return cls(edit, write[0] @ found.place.weight(model).to(write))

    @property
    def place(self) -> Place:
        """The map in the plain model."""
        place = self.edit.directions.place
        assert place is not None
        return place

    def attach(self, model: nn.Module, tracker: PositionTracker) -> Callable[[], None]:
        """Put the hook on; the function returned takes it off."""
        module = model.get_submodule(self.place.module)
        features = self.place.features(self.edit.table.device)

        def change_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (self.edit.edited(args[0], tracker), *args[1:])

        def change_output(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if features is None:
                return self.edit.edited(output, tracker)
            return self._changed_part(args[0], output, features, tracker)

        if self.edit.directions.site.side == "in" and features is None:
            return module.register_forward_pre_hook(change_input).remove
        return module.register_forward_hook(change_output).remove

    def _changed_part(
        self,
        value: Tensor,
        output: Tensor,
        features: Int[Tensor, " all_out"],
        tracker: PositionTracker,
    ) -> Tensor:
        """The output with other features where this map makes them."""
        if self.through is None:
            part = self.edit.edited(output.index_select(-1, features), tracker)
            return output.index_copy(-1, features, part)
        moved = self.edit.moved(value, tracker)
        change = einsum(moved, self.through, "batch pos one k, k all_out -> batch pos all_out")
        return output.index_add(-1, features, change.to(output.dtype).view(*output.shape[:-1], -1))
