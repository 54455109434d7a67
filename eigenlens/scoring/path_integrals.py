"""EAP-IG: slopes averaged along a path from the references to what is there.

The nodes of a path are the midpoints of equal parts; the papers' right ends need more of them for
the same error.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.matrices import Site
from eigenlens.metrics import answer_logits
from eigenlens.passes import Activation, without_padding
from eigenlens.position_means import PositionMeans
from eigenlens.scoring.references import References, Swap
from eigenlens.scoring.running import Passes, Totals
from eigenlens.spectra import freeze_coordinates
from eigenlens.tasks.batches import Batch

_EMBEDDINGS = "blocks.0.hook_in"


def midpoints(steps: int) -> list[float]:
    """Nodes of the midpoint rule on 0 … 1."""
    return [(node + 0.5) / steps for node in range(steps)]


def eap_ig_inputs(
    passes: Passes, references: References, batches: Sequence[Batch], steps: int
) -> Totals:
    """Slopes along the path of the input embeddings."""
    total = passes.zeros()
    embeddings = _Embeddings(passes.model, references, batches)
    for batch in passes.bar(batches, "eap_ig_inputs"):
        swap = references.swap(batch)
        moves = passes.moves(references, batch, swap)
        other = embeddings.other(batch, swap)

        def add(
            site: Site,
            h: Activation,
            g: Activation,
            values: Tensor,
            moves: dict[str, Tensor] = moves,
        ) -> None:
            s = passes.spectra[site.name]
            total[site.name] += (moves[site.name] * s.slopes(g.to(s.dtype))).sum((0, 1)) / steps

        for share in midpoints(steps):

            def move(value: Tensor, hook: Any, share: float = share, other: Tensor = other) -> Any:
                return other + share * (value - other)

            passes.differentiate(batch, add, hooks=[(_EMBEDDINGS, move)])
    return total


def eap_ig_activations(
    passes: Passes, references: References, batches: Sequence[Batch], steps: int
) -> Totals:
    """Slopes along the path of the coordinates of one matrix at a time."""
    total = passes.zeros()
    for batch in passes.bar(batches, "eap_ig_activations"):
        swap = references.swap(batch)
        moves = passes.moves(references, batch, swap)
        for name, s in passes.spectra.items():
            site, delta = s.site, moves[name]

            def add(
                site: Site, h: Activation, g: Activation, values: Tensor, delta: Tensor = delta
            ) -> None:
                s = passes.spectra[site.name]
                total[site.name] += (delta * s.slopes(g.to(s.dtype))).sum((0, 1)) / steps

            for share in midpoints(steps):

                def move(
                    value: Tensor,
                    hook: Any,
                    share: float = share,
                    site: Site = site,
                    delta: Tensor = delta,
                ) -> Tensor:
                    h = site.split(value, delta.shape[1])
                    s = passes.spectra[site.name]
                    goal = s.coordinates(h.to(s.dtype)) + delta
                    moved = freeze_coordinates(h, s, goal, share)
                    return moved.reshape(value.shape).contiguous()

                passes.differentiate(batch, add, [site], [(site.hook, move)])
    return total


class _Embeddings:
    """What the input embeddings of a batch start from."""

    def __init__(
        self, model: TransformerBridge, references: References, batches: Sequence[Batch]
    ) -> None:
        self._model = model
        self._references = references
        self._table: Tensor | None = None
        if not references.swaps and not references.is_zero:
            self._table = self._means(batches)

    def _of(self, batch: Batch) -> Float[Tensor, "batch pos d_model"]:
        seen: list[Tensor] = []

        def keep(value: Tensor, hook: Any) -> None:
            seen.append(value)

        with torch.no_grad(), self._model.hooks(fwd_hooks=[(_EMBEDDINGS, keep)]):
            answer_logits(self._model, batch)
        return seen[0]

    def _means(self, batches: Sequence[Batch]) -> Tensor:
        positions = self._references.positions
        sums: Tensor | None = None
        for batch in batches:
            value = without_padding(self._of(batch), batch).sum(0)
            if sums is None:
                sums = value.new_zeros(len(positions) + 1, value.shape[-1])
            sums.index_add_(0, positions.of_batch(batch).to(sums.device), value)
        assert sums is not None
        means = PositionMeans.from_sums(positions, sums, positions.count(batches))
        return rearrange(torch.tensor(means.table()), "width row -> row width").to(sums)

    def other(self, batch: Batch, swap: Swap | None) -> Float[Tensor, "#batch pos d_model"]:
        """The beginning of the path."""
        if swap is not None:
            counterpart = self._references.counterpart(batch)
            if counterpart is not None:
                return self._of(counterpart)
            return swap.of(_EMBEDDINGS, self._of(batch))
        if self._table is None:
            return torch.zeros_like(self._of(batch))
        return self._table[self._references.positions.of_batch(batch).to(self._table.device)][None]
