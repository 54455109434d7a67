"""The passes over the data that fill the accumulators, through TransformerLens' hooks.

Sign: ``delta_loss < 0`` predicts that freezing the component lowers the loss.
Cost: one forward and one backward pass per batch; criteria other than ``mean`` and standard errors
take one forward pass more, for the means that single effects are measured against, unless these
are given.
Memory: per matrix the sums of :mod:`eigenlens.scoring.accumulators`, whatever the number of
examples: ``width²`` numbers of the small side, or where ``memory_gb`` has no room for them one per
component. Activations of a batch are held until the backward pass has used them. What is kept per
position is ``n_positions`` + answer tokens + 2 numbers per component, however long the prompts: of
SmolLM2-135M (97,920 components, float32) 0.4 MB a position, so 200 MB for 512 positions of their
own, and 13 MB for ``n_positions=32``. What a batch takes grows with ``batch_size`` × its longest
prompt.
Source: Eigenpruning (arXiv 2404.03147), section 3; attribution patching (Nanda, 2023).
"""

from collections.abc import Sequence
from functools import cached_property, partial

import numpy as np
import psutil
import torch
from datasets import Dataset
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.far_side import zero_coordinates
from eigenlens.inputs import check_data
from eigenlens.matrices import Site
from eigenlens.memory import fitting
from eigenlens.metrics import Metric, answer_loss, check_eval_mode
from eigenlens.passes import (
    Activation,
    FiniteCheck,
    forward_backward,
    record,
    widened,
    without_padding,
)
from eigenlens.position_means import PositionMeans, Positions
from eigenlens.scoring.accumulators import ActivationSums, CrossSums, EffectSums, spread
from eigenlens.scoring.scores import (
    CRITERIA,
    REFERENCES,
    Criterion,
    Reference,
    Scores,
)
from eigenlens.spectra import COMPONENT, Spectra
from eigenlens.tasks.batches import Batch, make_batches

_BY_POSITION = ("max", "max_everywhere", "position_fisher")
Statistics = dict[str, list[Float[Tensor, "_ _"]]]  # [head, k] of each matrix


def score(
    model: TransformerBridge,
    spectra: Spectra,
    data: Dataset,
    *,
    criterion: Criterion | str = "mean",
    reference: Reference | str = "mean",
    metric: Metric = answer_loss,
    stderr: bool = False,
    n_positions: int | None = None,
    means: Scores | None = None,
    batch_size: int = 50,
    memory_gb: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score the effect of freezing every component on a metric.

    Args:
        model: in eval mode.
        spectra: components of it, or of another object with the same weights.
        data: examples with the columns ``prompt`` and ``answer``.
        criterion: what ranks components: ``mean`` effect over examples, ``max`` (worst effect over
            examples and the positions that vary), ``max_everywhere`` (over all positions, as the
            paper's code does: no maximum is then below zero), ``ucb`` (mean + standard deviation),
            ``fisher`` (mean + ½ mean square: the empirical-Fisher second-order estimate of the
            loss), ``margin`` (the loss if freezing moves the answer's log-odds linearly),
            ``position_fisher`` (as ``fisher``, with positions apart). The last three suppose that
            the metric is a negative log-likelihood.
        reference: what freezing puts in place of a coordinate: its per-position ``mean``, the one
            mean over all positions (``shared``), that at input ``zero``, or that of another example
            of the batch (``resample``).
        metric: a number per example from ``(logits at the answer positions, batch)``; the loss
            (negative log-likelihood of the answer, nats) by default.
        stderr: also compute standard errors over examples.
        n_positions: how many of the last positions of the prompt have a mean of their own; all
            earlier ones share one (for long prompts of many lengths). ``None``: every position.
        means: scores of the same components whose means freezing puts in place, where those of
            ``data`` under the model of now are not meant: scoring under an edit, or on a part of
            the examples. Saves the forward pass for the means; ``n_positions`` is then theirs.
        batch_size: examples per pass.
        memory_gb: room for sums of outer products; by default a quarter of what is free.
        seed: of the resampling.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown criterion or reference; a negative ``n_positions``; a model in
            training mode or with other weights than ``spectra``; ``means`` of other components; an
            empty or untokenisable data set; prompts longer than the context; ``resample`` with a
            batch of one; NaN or infinite activations.
    """
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("reference", reference, REFERENCES)
    check_eval_mode(model)
    check_data(data)
    spectra = spectra.on(model)
    if means is not None:
        _check_components(means, spectra)
    smallest = 2 if reference == "resample" else 1

    def passes(size: int) -> tuple[dict[str, np.ndarray], PositionMeans]:
        batches = make_batches(data, model, size, smallest=smallest)
        positions = Positions.of(batches, n_positions)
        if means is not None:
            positions = means.means.positions
        elif reference in ("shared", "zero"):
            positions = Positions()
        given = None if means is None else means.means
        run = _Scorer(model, spectra, batches, reference, metric, positions, given, seed, progress)
        if criterion == "mean" and not stderr:
            statistics = run.streaming(memory_gb)
        else:
            statistics = run.per_example(criterion)
        return _columns(statistics), run.means

    columns, found = fitting(model, "score", min(batch_size, len(data)), passes, smallest=smallest)
    return Scores.made_of(
        spectra, columns, found, data, criterion=criterion, reference=reference, seed=seed
    )


def _columns(statistics: Statistics) -> dict[str, np.ndarray]:
    return {
        name: torch.cat([part.flatten().cpu() for part in parts]).double().numpy()
        for name, parts in statistics.items()
    }


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}; choose from {', '.join(known)}.")


def _check_components(means: Scores, spectra: Spectra) -> None:
    wanted = spectra.components[COMPONENT]
    if not wanted.equals(means.components[COMPONENT].reset_index(drop=True)):
        raise ValueError(
            f"The means are of {len(means):,} components, and not of the {len(wanted):,} to score: "
            "score the same matrices and layers."
        )


def varying_positions(batches: Sequence[Batch], positions: Positions) -> Bool[Tensor, " row"]:
    """Rows of positions that at least two examples reach by different tokens.

    Elsewhere every activation equals its mean, and an effect of exactly zero says nothing: a
    maximum over such positions would hide harm.
    """
    prefixes: list[set[int]] = [set() for _ in range(len(positions) + 1)]
    for batch in batches:
        rows = positions.of_batch(batch).tolist()
        for tokens, there in zip(batch.tokens.tolist(), batch.attention_mask.tolist(), strict=True):
            prefix = 0
            for column, token in enumerate(tokens):
                if there[column]:
                    prefix = hash((prefix, token))
                    prefixes[rows[column]].add(prefix)
    return torch.tensor([len(seen) > 1 for seen in prefixes])


def has_room(spectra: Spectra, memory_gb: float | None) -> bool:
    """Whether the sums of outer products of all matrices fit into ``memory_gb``."""
    needed = sum(s.site.n_heads * s.site.width**2 * s.dtype.itemsize for s in spectra.values())
    if memory_gb is None:
        device = next(iter(spectra.values())).device
        if device.type == "cuda":
            memory_gb = torch.cuda.mem_get_info(device)[0] / 4e9
        else:
            memory_gb = psutil.virtual_memory().available / 4e9
    return needed <= memory_gb * 1e9


class _Scorer:
    """One scoring run: the batches, their positions, and the sums per matrix."""

    def __init__(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        batches: list[Batch],
        reference: str,
        metric: Metric,
        positions: Positions,
        given: PositionMeans | None,
        seed: int,
        progress: bool,
    ) -> None:
        self.model = model
        self.spectra = spectra
        self.batches = batches
        self.reference = reference
        self.metric = metric
        self.positions = positions
        self.given = given
        self.progress = progress
        self.generator = torch.Generator().manual_seed(seed)
        self.n_examples = sum(len(batch) for batch in batches)
        self.sites = [s.site for s in spectra.values()]
        self.finite = FiniteCheck()
        self.sums = self._activation_sums()

    def _activation_sums(self) -> dict[str, ActivationSums]:
        n_rows = len(self.positions) + 1
        return {name: ActivationSums.zeros(s, n_rows) for name, s in self.spectra.items()}

    @cached_property
    def means(self) -> PositionMeans:
        """What freezing puts in place of each coordinate, once the sums are complete."""
        if self.given is not None:
            return self.given
        if self.reference == "zero":
            zero = [zero_coordinates(self.model, s).flatten() for s in self.spectra.values()]
            return PositionMeans.constant(torch.cat([z.cpu() for z in zero]).numpy())
        total = [
            s.coordinates(self.sums[name].total).flatten(1).cpu()
            for name, s in self.spectra.items()
        ]
        count = self.positions.count(self.batches).cpu()
        return PositionMeans.from_sums(self.positions, torch.cat(total, dim=1), count)

    def references(self) -> dict[str, Float[Tensor, "row _ _"]]:
        """What takes a coordinate's place, by row of positions."""
        return split_table(self.spectra, torch.tensor(self.means.table()))

    def streaming(self, memory_gb: float | None) -> Statistics:
        """Mean effects from one forward and one backward pass per batch."""
        whole = has_room(self.spectra, memory_gb)
        cross = {name: CrossSums.zeros(s, whole=whole) for name, s in self.spectra.items()}
        slopes = self._activation_sums()
        for batch in self._bar("score"):
            rows, partner = self.positions.of_batch(batch), self._partner(batch)

            def add(
                site: Site,
                h: Activation,
                g: Activation,
                values: Tensor,
                rows: Tensor = rows,
                batch: Batch = batch,
                partner: Tensor | None = partner,
            ) -> None:
                h, g = without_padding(h, batch), without_padding(g, batch)
                if self.given is None:
                    self.sums[site.name].update(rows, h)
                if partner is not None:
                    h = h - _resampled(h, batch, partner)
                slopes[site.name].update(rows, g)
                cross[site.name].update(self.spectra[site.name], h, g)

            forward_backward(self.model, self.sites, batch, self.metric, add, self.finite)
        self.finite.check()
        references = self.references() if self.reference != "resample" else {}
        effects = []
        for name, s in self.spectra.items():
            total = -cross[name].on(s)
            if name in references:
                total = total + (references[name] * s.slopes(slopes[name].total)).sum(0)
            effects.append(total / self.n_examples)
        return {"effect": effects}

    def per_example(self, criterion: str) -> Statistics:
        """Mean, spread and worst of single effects; takes a forward pass for the means first."""
        for batch in self._bar("means") if self.given is None and self.reference != "zero" else ():
            rows = self.positions.of_batch(batch)
            add_means = partial(self._add_activation, batch, rows)
            record(self.model, self.sites, batch, add_means, self.finite)
        self.finite.check()
        references = self.references()
        by_position = criterion in _BY_POSITION
        axis = Positions.of(self.batches, self.positions.n_positions)
        varies = self._varying(criterion, axis) if by_position else None
        sums = {
            name: EffectSums.zeros(s, by_position=by_position) for name, s in self.spectra.items()
        }
        for batch in self._bar("score"):
            rows, partner = self.positions.of_batch(batch), self._partner(batch)
            here = batch.attention_mask
            if varies is not None:
                here = here & varies[axis.of_batch(batch)]

            def add(
                site: Site,
                h: Activation,
                g: Activation,
                values: Tensor,
                rows: Tensor = rows,
                batch: Batch = batch,
                partner: Tensor | None = partner,
                here: Tensor = here,
            ) -> None:
                s = self.spectra[site.name]
                c = s.coordinates(h.to(s.dtype))
                other = references[site.name][rows.to(s.device)]
                if partner is not None:
                    other = _resampled(c, batch, partner)
                effect = (other - c).mul_(s.slopes(g.to(s.dtype)))
                sums[site.name].update(without_padding(effect, batch), here, values)

            forward_backward(self.model, self.sites, batch, self.metric, add, self.finite)
        self.finite.check()
        n, found = self.n_examples, list(sums.values())
        statistics: Statistics = {
            "effect": [m.total / n for m in found],
            "std": [spread(m.total, m.square, n) for m in found],
            "margin": [m.margin / n for m in found],
            "margin_std": [spread(m.margin, m.margin_square, n) for m in found],
        }
        if by_position:
            statistics["position_square"] = [
                m.position_square / n for m in found if m.position_square is not None
            ]
            statistics["worst"] = [m.worst for m in found if m.worst is not None]
        return statistics

    def _varying(self, criterion: str, axis: Positions) -> Bool[Tensor, " row"]:
        varies = varying_positions(self.batches, axis)
        if criterion == "max_everywhere":
            varies[:] = True
        if not varies.any():
            raise ValueError("All examples have the same prompt: no activation varies.")
        return varies.to(self.batches[0].tokens.device)

    def _add_activation(self, batch: Batch, rows: Tensor, site: Site, h: Activation) -> None:
        self.sums[site.name].update(rows, without_padding(h, batch))

    def _partner(self, batch: Batch) -> Tensor | None:
        """For ``resample``: another example of the batch for each (a rotation by a random step)."""
        if self.reference != "resample":
            return None
        step = int(torch.randint(1, len(batch), (), generator=self.generator))
        return torch.arange(len(batch), device=batch.tokens.device).roll(step)

    def _bar(self, name: str) -> "tqdm[Batch]":
        return tqdm(self.batches, desc=name, unit="batch", disable=not self.progress)


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


def _resampled(values: Tensor, batch: Batch, partner: Tensor) -> Tensor:
    """Values of the partner, and one's own where the partner has no token."""
    there = widened(batch.attention_mask[partner], values)
    return torch.where(there, values[partner.to(values.device)], values)
