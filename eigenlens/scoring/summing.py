"""The passes over some examples that fill the accumulators of our own criteria."""

from jaxtyping import Bool
from torch import Tensor

from eigenlens.matrices import Site
from eigenlens.passes import Activation, without_padding
from eigenlens.position_means import Positions
from eigenlens.scoring.accumulators import Collected, CrossSums, EffectSums, Sums
from eigenlens.scoring.references import References, Swap
from eigenlens.scoring.running import Passes
from eigenlens.tasks.batches import Batch


def mean_sums(passes: Passes, references: References) -> Collected:
    """A forward pass of every batch for the means."""
    for batch in passes.bar(references.batches, "means"):
        references.run(batch)
    return _means(references)


def _means(references: References) -> Collected:
    found: dict[str, Sums] = dict(references.sums)
    return {"means": found}


def streaming_sums(
    passes: Passes, references: References, *, whole: bool, to_zero: bool
) -> Collected:
    """What mean effects follow from, and the means; a forward and a backward pass of every batch.

    ``whole`` keeps the sums of outer products. ``to_zero``: of a coordinate that becomes zero,
    whatever takes its place when it is frozen.
    """
    cross = {name: CrossSums.zeros(s, whole=whole) for name, s in passes.spectra.items()}
    slopes = references.empty_sums()
    for batch in passes.bar(references.batches, "score"):
        rows = references.positions.of_batch(batch)
        swap = references.swap(batch)

        def add(
            site: Site,
            h: Activation,
            g: Activation,
            values: Tensor,
            rows: Tensor = rows,
            batch: Batch = batch,
            swap: Swap | None = swap,
        ) -> None:
            g = without_padding(g, batch)
            other = None if swap is None else swap.of(site.name, h)
            # Of pairs, it is the counterparts whose means take the place.
            paired = swap is not None and swap.held is not None
            references.add(site, batch, other if paired and other is not None else h)
            if other is not None and not to_zero:
                h = h - other
            h = without_padding(h, batch)
            slopes[site.name].update(rows, g)
            cross[site.name].update(passes.spectra[site.name], h, g)

        passes.differentiate(batch, add)
    return {"cross": dict(cross), "slopes": dict(slopes), **_means(references)}


def single_sums(
    passes: Passes, references: References, *, axis: Positions, varies: Bool[Tensor, " row"] | None
) -> Collected:
    """What follows from the effects on single examples, a forward and a backward pass of each.

    ``varies`` says at which rows of ``axis`` examples differ, where single positions are asked for.
    """
    by_position = varies is not None
    sums = {n: EffectSums.zeros(s, by_position=by_position) for n, s in passes.spectra.items()}
    for batch in passes.bar(references.batches, "score"):
        swap = references.swap(batch)
        here = batch.attention_mask
        if varies is not None:
            here = here & varies[axis.of_batch(batch)]

        def add(
            site: Site,
            h: Activation,
            g: Activation,
            values: Tensor,
            batch: Batch = batch,
            swap: Swap | None = swap,
            here: Tensor = here,
        ) -> None:
            s = passes.spectra[site.name]
            other = references.coordinates(s, batch, swap, h)
            effect = (other - s.coordinates(h.to(s.dtype))).mul_(s.slopes(g.to(s.dtype)))
            sums[site.name].update(without_padding(effect, batch), here, values)

        passes.differentiate(batch, add)
    return {"effects": dict(sums)}
