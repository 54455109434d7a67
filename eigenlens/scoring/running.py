"""How scores of other methods run the model, batch by batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from eigenlens.bridges import TransformerBridge
from eigenlens.matrices import Site
from eigenlens.metrics import Metric
from eigenlens.passes import (
    Activation,
    FiniteCheck,
    GradHandler,
    forward_backward,
    record,
    without_padding,
)
from eigenlens.scoring.references import References, Swap
from eigenlens.spectra import Spectra
from eigenlens.tasks.batches import Batch

Totals = dict[str, Float[Tensor, "_ _"]]  # Σ_b of each component's score, by matrix name
Hooks = Sequence[tuple[str, Callable[..., Any]]]


@dataclass(frozen=True)
class Passes:
    """How the model is run over a batch."""

    model: TransformerBridge
    spectra: Spectra
    metric: Metric
    finite: FiniteCheck
    progress: bool

    @property
    def sites(self) -> list[Site]:
        """The activations of all matrices."""
        return [s.site for s in self.spectra.values()]

    def differentiate(
        self,
        batch: Batch,
        handle: GradHandler,
        sites: Sequence[Site] | None = None,
        hooks: Hooks = (),
    ) -> None:
        """One forward and one backward pass; see :func:`eigenlens.passes.forward_backward`."""
        chosen = self.sites if sites is None else sites
        forward_backward(self.model, chosen, batch, self.metric, handle, self.finite, hooks)

    def bar(self, batches: Sequence[Batch], name: str) -> "tqdm[Batch]":
        """Batches with a progress bar."""
        return tqdm(batches, desc=name, unit="batch", disable=not self.progress)

    def zeros(self) -> Totals:
        """Nothing summed yet."""
        return {
            name: torch.zeros(s.sigma.shape, dtype=s.dtype, device=s.device)
            for name, s in self.spectra.items()
        }

    def moves(self, references: References, batch: Batch, swap: Swap | None) -> dict[str, Tensor]:
        """``δ`` of every coordinate of a batch, ``[batch, pos, head, k]``; zero at padding."""
        found: dict[str, Tensor] = {}

        def keep(site: Site, h: Activation) -> None:
            s = self.spectra[site.name]
            other = references.coordinates(s, batch, swap, h)
            found[site.name] = without_padding(other - s.coordinates(h.to(s.dtype)), batch)

        record(self.model, self.sites, batch, keep, self.finite)
        return found
