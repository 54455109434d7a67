"""Freezing as a change of low rank of the plain model's own maps.

Of ``y = x W + b``, freezing k coordinates with strengths z adds ``(t + x D) U`` to the output:

- side out, ``y' = y + ((c̄ − y R) ∘ z) V``: ``D = −W R``, ``U = z V``, ``t = c̄ − b R``;
- side in, ``x' = x + ((c̄ − x R) ∘ z) V``:  ``D = −R``,   ``U = z V W``, ``t = c̄``.

``W + D U`` has lost the components (at z = 1 its rank falls by k), and ``t U`` is a bias: one for
each position, or a single one where means are shared.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eigenlens.export.attach import PlainEdit, plain_edits
from eigenlens.frozen_set import FrozenSet
from eigenlens.places import Place


@dataclass(frozen=True)
class LowRank:
    """``y' = y + (t + x D) U`` of one module.

    Attributes:
        down: ``D``.
        up: ``U``.
        table: ``t``, by row of the positions of the means.
    """

    down: Float[Tensor, "all_in k"]
    up: Float[Tensor, "k all_out"]
    table: Float[Tensor, "row k"]

    @property
    def weight(self) -> Float[Tensor, "all_in all_out"]:
        """What is added to the weight, ``x @ W`` orientation."""
        return self.down @ self.up

    @property
    def bias(self) -> Float[Tensor, " all_out"]:
        """What is added to the bias under shared means."""
        (mean,) = self.table
        return mean @ self.up


def low_rank_changes(
    model: nn.Module, frozen: FrozenSet, *, allow_dtype: bool = False
) -> dict[str, LowRank]:
    """The change of each module of a plain model, by its path.

    Raises:
        WrongModelError, ValueError, UnsupportedModelError: as :func:`eigenlens.export.attach`.
    """
    parts: dict[str, list[LowRank]] = {}
    for edit in plain_edits(model, frozen, allow_dtype=allow_dtype):
        parts.setdefault(edit.place.module, []).append(_change(model, edit))
    return {path: _together(own) for path, own in parts.items()}


def _change(model: nn.Module, edit: PlainEdit) -> LowRank:
    directions, place = edit.edit.directions, edit.place
    read, write = directions.read, directions.write
    assert read is not None
    assert write is not None
    read, write = read[0], write[0] * edit.edit.strength.mT
    table = edit.edit.table[:, 0]
    weight = place.weight(model).to(read)
    if directions.site.side == "in":
        down, up = -read, write @ weight
    else:
        down, up = -weight @ read, write
        bias = place.bias(model)
        if bias is not None:
            table = table - bias.to(read) @ read
    features = place.features(up.device)
    if features is not None:
        wide = up.new_zeros(len(up), Place(place.module).weight(model).shape[1])
        up = wide.index_copy(1, features, up)
    return LowRank(down, up, table)


def _together(parts: list[LowRank]) -> LowRank:
    """The changes of all maps that one module makes."""
    return LowRank(
        torch.cat([part.down for part in parts], 1),
        torch.cat([part.up for part in parts]),
        torch.cat([part.table for part in parts], 1),
    )
