"""What takes the place of a coordinate: means over the data, or another run of the same batch.

With the references ``mean``, ``shared`` and ``zero`` it is one value per component and position.
With ``resample`` it is the coordinate of another example of the batch, with ``pair`` that of the
counterpart of the example itself (:mod:`eigenlens.tasks.pairs`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

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
from eigenlens.position_means import PositionMeans, Positions
from eigenlens.scoring.accumulators import ActivationSums
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
    """The references of one scoring run, and the sums that means are made of."""

    def __init__(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        batches: Sequence[Batch],
        pairs: Sequence[Batch] | None,
        reference: str,
        positions: Positions,
        given: PositionMeans | None,
        seed: int,
        finite: FiniteCheck,
    ) -> None:
        """``pairs`` are the counterparts of ``batches`` where the reference is ``pair``."""
        self.positions = positions
        self._model = model
        self._spectra = spectra
        self._batches = batches
        self._pairs = dict(zip(map(id, batches), pairs or (), strict=False))
        self._reference = reference
        self._given = given
        self._generator = torch.Generator().manual_seed(seed)
        self._finite = finite
        self._sums = self.empty_sums()

    def empty_sums(self) -> dict[str, ActivationSums]:
        """A row for each position that has one of its own, and one for the others."""
        n_rows = len(self.positions) + 1
        return {name: ActivationSums.zeros(s, n_rows) for name, s in self._spectra.items()}

    @property
    def swaps(self) -> bool:
        """Whether another run takes an activation's place, and not one value."""
        return self._reference in ("resample", "pair")

    @property
    def is_zero(self) -> bool:
        """Whether the inputs of maps count as zero."""
        return self._reference == "zero"

    @property
    def need_a_pass(self) -> bool:
        """Whether means come from the data."""
        return self._given is None and self._reference != "zero"

    def add(self, site: Site, batch: Batch, h: Activation) -> None:
        """Add what the site was seen to hold, or its counterpart did, to the means."""
        if self._given is None:
            rows = self.positions.of_batch(batch)
            self._sums[site.name].update(rows, without_padding(h, batch))

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
        if self._reference == "resample":
            step = int(torch.randint(1, len(batch), (), generator=self._generator))
            partner = torch.arange(len(batch), device=batch.tokens.device).roll(step)
            return Swap(batch, partner=partner)
        if self._reference != "pair":
            return None
        other = self._pairs[id(batch)]
        return Swap(batch, held=activations(self._model, self.sites, other, self._finite))

    def counterpart(self, batch: Batch) -> Batch | None:
        """The other tokens of a batch, where the reference is ``pair``."""
        return self._pairs.get(id(batch))

    @cached_property
    def means(self) -> PositionMeans:
        """What freezing puts in place of each coordinate, once the sums are complete."""
        if self._given is not None:
            return self._given
        if self._reference == "zero":
            zero = [zero_coordinates(self._model, s).flatten() for s in self._spectra.values()]
            return PositionMeans.constant(torch.cat([z.cpu() for z in zero]).numpy())
        total = [
            s.coordinates(self._sums[name].total).flatten(1).cpu()
            for name, s in self._spectra.items()
        ]
        count = self.positions.count(self._batches).cpu()
        return PositionMeans.from_sums(self.positions, torch.cat(total, dim=1), count)

    @cached_property
    def values(self) -> dict[str, Float[Tensor, "row _ _"]]:
        """The means by row of positions, where their directions are."""
        return split_table(self._spectra, torch.tensor(self.means.table()))

    def coordinates(
        self, s: Spectrum, batch: Batch, swap: Swap | None, h: Activation
    ) -> Float[Tensor, "#batch pos head k"]:
        """What takes the place of the coordinates of a batch's activation."""
        if swap is not None:
            return s.coordinates(swap.of(s.name, h).to(s.dtype))
        return self.values[s.name][self.positions.of_batch(batch).to(s.device)][None]


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
