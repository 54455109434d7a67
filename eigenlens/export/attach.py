"""``attach``: an edit in a plain transformers model, by hooks of PyTorch.

One hook per activation, as in a bridge: on the input of a map before it runs, or on its output.
Where the plain model makes several maps with one matrix, an output is some of that matrix's output
features; and an input that they share must stay as it is for the others, so that what freezing adds
to it goes through the map's own part of the matrix and is added to that part's output.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from eigenlens.export.plain import Place, bridge_around, place_of, places
from eigenlens.freezing import Edit, SiteEdit, site_edits
from eigenlens.frozen_set import FrozenSet, check_frozen
from eigenlens.positions import PositionTracker


def attach(
    model: nn.Module,
    frozen: FrozenSet,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    allow_dtype: bool = False,
) -> "Attachment":
    """Put an edit on a plain transformers model, until ``undo()`` or the end of a ``with`` block.

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
        UnsupportedModelError: TransformerLens has no bridge for it.
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
    bridge = bridge_around(model)
    known = places(bridge)
    return [
        PlainEdit.of(edit, place_of(edit.directions.site.find(bridge), known, model), model)
        for edit in site_edits(bridge, frozen, allow_dtype=allow_dtype).values()
    ]


@dataclass(frozen=True)
class PlainEdit:
    """The edit of one activation of a plain model.

    Attributes:
        edit: of the activation.
        place: the map.
        through: for inputs that several maps share: what one unit of each coordinate adds to the
            output of this one.
    """

    edit: SiteEdit
    place: Place
    through: Float[Tensor, "k all_out"] | None = None

    @classmethod
    def of(cls, edit: SiteEdit, place: Place, model: nn.Module) -> "PlainEdit":
        """The edit of a bridge's activation where the plain model has it."""
        if place.features is None or edit.directions.site.side == "out":
            return cls(edit, place)
        write = edit.directions.write
        assert write is not None
        return cls(edit, place, write[0] @ place.weight(model).to(write))

    def attach(self, model: nn.Module, tracker: PositionTracker) -> Callable[[], None]:
        """Put the hook on; the function returned takes it off."""
        module = model.get_submodule(self.place.module)
        features = self.place.features
        if features is not None:
            features = features.to(self.edit.table.device)

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
