"""What takes the place of a coordinate: means over the data, or another run of the same batch.

With the references ``mean``, ``shared`` and ``zero`` it is one value per component and position.
With ``resample`` it is the coordinate of another example of the batch, with ``pair`` that of the
counterpart of the example itself (:mod:`eigenlens.tasks.pairs`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.far_side import zero_coordinates
from eigenlens.matrices import Site
from eigenlens.passes import (
    Activation,
    FiniteCheck,
    activations,
    record,
    widened,
    without_padding,
)
from eigenlens.position_means import PositionMeans
from eigenlens.scoring.accumulators import ActivationSums, Sums
from eigenlens.scoring.plan import Plan
from eigenlens.spectra import Spectra, Spectrum
from eigenlens.tasks.batches import Batch


@dataclass(frozen=True)
class Swap:
    """The other run that a batch's activations are exchanged with.

    Attributes:
        batch: the batch.
        partner: another example of the batch for each, or
        held: activations of the counterparts by matrix name.
    """

    batch: Batch
    partner: Int[Tensor, " batch"] | None = None
    held: dict[str, Tensor] | None = None

    def of(self, name: str, values: Float[Tensor, "batch pos *rest"]) -> Tensor:
        """What takes the place of an activation; one's own where the partner has no token."""
        if self.held is not None:
            return self.held[name]
        assert self.partner is not None
        there = widened(self.batch.attention_mask[self.partner], values)
        return torch.where(there, values[self.partner.to(values.device)], values)


class References:
    """The references of some examples, and the sums that means are made of.

    Attributes:
        sums: of the activations, where the means are not known yet.
    """

    def __init__(
        self, model: TransformerBridge, spectra: Spectra, plan: Plan, finite: FiniteCheck
    ) -> None:
        self.batches = plan.batches
        self.positions = plan.positions
        self._model = model
        self._spectra = spectra
        self._pairs = dict(zip(map(id, plan.batches), plan.pairs or (), strict=False))
        self._rolls = dict(zip(map(id, plan.batches), plan.rolls or (), strict=False))
        self._means = plan.means
        self._finite = finite
        self.sums = self.empty_sums() if plan.means is None else {}

    def empty_sums(self) -> dict[str, ActivationSums]:
        """A row for each position that has one of its own, and one for the others."""
        n_rows = len(self.positions) + 1
        return {name: ActivationSums.zeros(s, n_rows) for name, s in self._spectra.items()}

    def add(self, site: Site, batch: Batch, h: Activation) -> None:
        """Add what the site was seen to hold, or its counterpart did, to the means."""
        if self.sums:
            rows = self.positions.of_batch(batch)
            self.sums[site.name].update(rows, without_padding(h, batch))

    def run(self, batch: Batch) -> None:
        """A forward pass of a batch, or of its counterpart, for the means alone."""

        def add(site: Site, h: Activation) -> None:
            self.add(site, batch, h)

        read = self._pairs.get(id(batch), batch)
        record(self._model, self.sites, read, add, self._finite)

    @property
    def sites(self) -> list[Site]:
        """The activations that are scored."""
        return [s.site for s in self._spectra.values()]

    def swap(self, batch: Batch) -> Swap | None:
        """The other run of a batch; ``None`` where a value takes the place of coordinates."""
        roll = self._rolls.get(id(batch))
        if roll is not None:
            partner = torch.arange(len(batch), device=batch.tokens.device).roll(roll)
            return Swap(batch, partner=partner)
        other = self._pairs.get(id(batch))
        if other is None:
            return None
        return Swap(batch, held=activations(self._model, self.sites, other, self._finite))

    def counterpart(self, batch: Batch) -> Batch | None:
        """The other tokens of a batch, where the reference is ``pair``."""
        return self._pairs.get(id(batch))

    @cached_property
    def values(self) -> dict[str, Float[Tensor, "row _ _"]]:
        """The means by row of positions, where their directions are."""
        assert self._means is not None
        return split_table(self._spectra, torch.tensor(self._means.table()))

    def coordinates(
        self, s: Spectrum, batch: Batch, swap: Swap | None, h: Activation
    ) -> Float[Tensor, "#batch pos head k"]:
        """What takes the place of the coordinates of a batch's activation."""
        if swap is not None:
            return s.coordinates(swap.of(s.name, h).to(s.dtype))
        return self.values[s.name][self.positions.of_batch(batch).to(s.device)][None]


def zero_means(model: TransformerBridge, spectra: Spectra) -> PositionMeans:
    """The coordinates that maps have at input zero."""
    zero = [zero_coordinates(model, s).flatten() for s in spectra.values()]
    return PositionMeans.constant(torch.cat([z.cpu() for z in zero]).numpy())


def means_of_sums(spectra: Spectra, plan: Plan, sums: Mapping[str, Sums]) -> PositionMeans:
    """The means of coordinates from the sums of activations over all examples."""
    total = []
    for name, s in spectra.items():
        one = sums[name]
        assert isinstance(one, ActivationSums)
        total.append(s.coordinates(one.total).flatten(1).cpu())
    count = plan.positions.count(plan.batches).cpu()
    return PositionMeans.from_sums(plan.positions, torch.cat(total, dim=1), count)


def split_table(
    spectra: Spectra, table: Float[Tensor, "component row"]
) -> dict[str, Float[Tensor, "row _ _"]]:
    """A table over all components cut into matrices, where their directions are."""
    return {
        s.name: rearrange(part, "(head k) row -> row head k", head=s.site.n_heads).to(
            s.device, s.dtype
        )
        for s, part in zip(spectra.values(), table.split(spectra.sizes), strict=True)
    }
