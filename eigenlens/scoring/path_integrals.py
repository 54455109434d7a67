"""EAP-IG: slopes averaged along a path from the references to what is there.

The nodes of a path are the midpoints of equal parts; the papers' right ends need more of them for
the same error.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.matrices import Site
from eigenlens.metrics import answer_logits
from eigenlens.passes import Activation, without_padding
from eigenlens.position_means import PositionMeans
from eigenlens.scoring.accumulators import ActivationSums, Collected
from eigenlens.scoring.plan import Plan
from eigenlens.scoring.references import References, Swap
from eigenlens.scoring.running import Passes, Totals
from eigenlens.spectra import freeze_coordinates
from eigenlens.tasks.batches import Batch

_EMBEDDINGS = "blocks.0.hook_in"


def midpoints(steps: int) -> list[float]:
    """Nodes of the midpoint rule on 0 … 1."""
    return [(node + 0.5) / steps for node in range(steps)]


def eap_ig_inputs(
    passes: Passes, references: References, *, steps: int, start: Tensor | None
) -> Totals:
    """Slopes along the path of the input embeddings.

    ``start`` is the beginning of the path by row of positions, where it is no other run of the
    batch; zero for ``None``.
    """
    total = passes.zeros()
    for batch in passes.bar(references.batches, "eap_ig_inputs"):
        swap = references.swap(batch)
        moves = passes.moves(references, batch, swap)
        other = _start(passes.model, references, batch, swap, start)

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


def eap_ig_activations(passes: Passes, references: References, *, steps: int) -> Totals:
    """Slopes along the path of the coordinates of one matrix at a time."""
    total = passes.zeros()
    for batch in passes.bar(references.batches, "eap_ig_activations"):
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


def embedding_sums(passes: Passes, references: References) -> Collected:
    """A pass for the means of the input embeddings."""
    positions = references.positions
    sums: ActivationSums | None = None
    for batch in passes.bar(references.batches, "embeddings"):
        value = without_padding(_embeddings(passes.model, batch), batch)[:, :, None]
        if sums is None:
            sums = ActivationSums(value.new_zeros(len(positions) + 1, *value.shape[2:]))
        sums.update(positions.of_batch(batch), value)
    assert sums is not None
    return {"embeddings": {_EMBEDDINGS: sums}}


def embedding_means(plan: Plan, found: Collected) -> Float[Tensor, "row d_model"]:
    """Means of the input embeddings of all examples, by row of positions."""
    sums = found["embeddings"][_EMBEDDINGS]
    assert isinstance(sums, ActivationSums)
    total = sums.total.flatten(1)
    means = PositionMeans.from_sums(plan.positions, total, plan.positions.count(plan.batches))
    return rearrange(torch.tensor(means.table()), "width row -> row width").to(total)


def _embeddings(model: TransformerBridge, batch: Batch) -> Float[Tensor, "batch pos d_model"]:
    seen: list[Tensor] = []

    def keep(value: Tensor, hook: Any) -> None:
        seen.append(value)

    with torch.no_grad(), model.hooks(fwd_hooks=[(_EMBEDDINGS, keep)]):
        answer_logits(model, batch)
    return seen[0]


def _start(
    model: TransformerBridge,
    references: References,
    batch: Batch,
    swap: Swap | None,
    start: Float[Tensor, "row d_model"] | None,
) -> Float[Tensor, "#batch pos d_model"]:
    """The beginning of the path."""
    if swap is not None:
        counterpart = references.counterpart(batch)
        if counterpart is not None:
            return _embeddings(model, counterpart)
        return swap.of(_EMBEDDINGS, _embeddings(model, batch))
    if start is None:
        return torch.zeros_like(_embeddings(model, batch))
    return start[references.positions.of_batch(batch).to(start.device)][None]
