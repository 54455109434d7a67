"""First-order effects of freezing at given means, as a backward pass reaches each activation."""

from collections.abc import Callable

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from eigenlens.matrices import Site
from eigenlens.passes import Activation, GradHandler, without_padding
from eigenlens.position_means import PositionMeans
from eigenlens.scoring.references import split_table
from eigenlens.spectra import Spectra
from eigenlens.tasks.batches import Batch

PerExample = Float[Tensor, "batch head k"]


class MeanEffects:
    """What means in place of coordinates do to a metric, and what moving the means does."""

    def __init__(self, spectra: Spectra, means: PositionMeans) -> None:
        """Effects of these components, frozen at ``means``."""
        self._spectra = spectra
        self._positions = means.positions
        self._tables = split_table(spectra, torch.tensor(means.table()))

    def handler(
        self, batch: Batch, use: Callable[[str, PerExample, PerExample], None]
    ) -> GradHandler:
        """For :func:`eigenlens.passes.forward_backward` of ``batch``.

        ``use(name, effect, slope)`` gets of every matrix, summed over positions, the effects
        ``Σ_t (c̄_t − c_t) s_t`` and the slopes ``Σ_t s_t``.
        """
        rows = self._positions.of_batch(batch)

        def handle(site: Site, h: Activation, g: Activation, values: Tensor) -> None:
            s = self._spectra[site.name]
            slopes = s.slopes(g.to(s.dtype))
            moved = self._tables[site.name][rows.to(s.device)] - s.coordinates(h.to(s.dtype))
            use(site.name, _summed(moved * slopes, batch), _summed(slopes, batch))

        return handle


def _summed(values: Float[Tensor, "batch pos head k"], batch: Batch) -> PerExample:
    return reduce(without_padding(values, batch), "batch pos head k -> batch head k", "sum")
