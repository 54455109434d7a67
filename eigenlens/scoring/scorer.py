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
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from torch import Tensor

from eigenlens.bridges import TransformerBridge
from eigenlens.inputs import check_data
from eigenlens.memory import fitting
from eigenlens.metrics import Metric, answer_loss, check_eval_mode
from eigenlens.position_means import PositionMeans, Positions
from eigenlens.scoring.accumulators import (
    ActivationSums,
    Collected,
    CrossSums,
    EffectSums,
    merged,
    spread,
)
from eigenlens.scoring.path_integrals import embedding_means, embedding_sums
from eigenlens.scoring.peers import check_peer, peer_effects, peer_sums
from eigenlens.scoring.plan import Plan
from eigenlens.scoring.references import means_of_sums, split_table, zero_means
from eigenlens.scoring.room import check_room, has_room
from eigenlens.scoring.scores import (
    CRITERIA,
    PEERS,
    REFERENCES,
    Criterion,
    Reference,
    Scores,
)
from eigenlens.scoring.shards import InTurn, Job, Shards, Work
from eigenlens.scoring.summing import mean_sums, single_sums, streaming_sums
from eigenlens.spectra import COMPONENT, Spectra
from eigenlens.tasks.batches import Batch

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
    steps: int = 5,
    batch_size: int = 50,
    memory_gb: float | None = None,
    budget_gb: float | None = None,
    seed: int = 0,
    shards: int | Shards = 1,
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
            ``position_fisher`` (as ``fisher``, with positions apart). These three suppose that
            the metric is a negative log-likelihood. ``grad_activation``, ``eap_ig_inputs``,
            ``eap_ig_activations``, ``atp_qk``, ``atp_drop`` and ``atp_star`` are scores of other
            methods (:mod:`eigenlens.scoring.peers`).
        reference: what freezing puts in place of a coordinate: its per-position ``mean``, the one
            mean over all positions (``shared``), that at input ``zero``, that of another example
            of the batch (``resample``), or that of the example's own counterpart, whose prompt is
            in the column ``corrupt`` (``pair``; the means that a frozen set then gets are those of
            the counterparts).
        metric: a number per example from ``(logits at the answer positions, batch)``; the loss
            (negative log-likelihood of the answer, nats) by default.
        stderr: also compute standard errors over examples.
        n_positions: how many of the last positions of the prompt have a mean of their own; all
            earlier ones share one (for long prompts of many lengths). ``None``: the last 128, which
            are all of prompts up to this length.
        means: scores of the same components whose means freezing puts in place, where those of
            ``data`` under the model of now are not meant: scoring under an edit, or on a part of
            the examples. Saves the forward pass for the means; ``n_positions`` is then theirs.
        steps: nodes of the paths of ``eap_ig_inputs`` and ``eap_ig_activations``.
        batch_size: examples per pass.
        memory_gb: room for sums of outer products; by default a quarter of what is free.
        budget_gb: room for all that is kept beside model and directions, in which it must fit; by
            default what is free. What is much is told before the first pass.
        seed: of the resampling.
        shards: in how many parts the examples are read, one after the other, whose sums are then
            merged; or a :class:`eigenlens.Cluster`, whose processes read them. Parts are of whole
            batches, so there are no more of them than batches.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown criterion or reference; a negative ``n_positions``; a model in
            training mode or with other weights than ``spectra``; ``means`` of other components; an
            empty or untokenisable data set; prompts longer than the context; ``resample`` with a
            batch of one; ``pair`` with an example that has no counterpart of as many tokens;
            ``steps`` or ``shards`` below 1; ``atp_drop`` and ``atp_star`` of one layer; more means
            and sums than there is room for; NaN or infinite activations.
    """
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("reference", reference, REFERENCES)
    check_eval_mode(model)
    check_data(data)
    spectra = spectra.on(model)
    check_peer(criterion, len(model.blocks), steps)
    if means is not None:
        _check_components(means, spectra)
    smallest = 2 if reference == "resample" else 1
    where = InTurn(shards) if isinstance(shards, int) else shards

    def passes(size: int) -> tuple[dict[str, np.ndarray], PositionMeans]:
        given = None if means is None else means.means
        options: dict[str, Any] = {"batch_size": size, "n_positions": n_positions, "seed": seed}
        plan = Plan.of(data, model, reference, given, **options)
        check_room(spectra, plan, budget_gb, progress=progress)
        if plan.means is None and reference == "zero":
            plan = replace(plan, means=zero_means(model, spectra))
        run = _Scorer(model, spectra, plan, metric, where, progress)
        if criterion == "grad_activation":
            statistics = run.streaming(memory_gb, to_zero=True)
        elif criterion in PEERS:
            statistics = run.by_peer(criterion, steps)
        elif criterion == "mean" and not stderr:
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


class _Scorer:
    """One scoring run: its passes over the shards, and what follows from their sums."""

    def __init__(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        plan: Plan,
        metric: Metric,
        shards: Shards,
        progress: bool,
    ) -> None:
        self.model = model
        self.spectra = spectra
        self.plan = plan
        self.metric = metric
        self.shards = shards
        self.progress = progress

    @property
    def means(self) -> PositionMeans:
        """What freezing puts in place of coordinates, once it is known."""
        assert self.plan.means is not None
        return self.plan.means

    def sums(self, name: str, work: Work) -> Collected:
        """A pass over all examples."""
        parts = self.plan.parts(self.shards.count)
        jobs = [Job(name, part, self.metric, work) for part in parts]
        found = self.shards.run(self.model, self.spectra, jobs, progress=self.progress)
        return merged(found)

    def streaming(self, memory_gb: float | None, *, to_zero: bool = False) -> Statistics:
        """Mean effects from one forward and one backward pass per batch.

        ``to_zero``: of a coordinate that becomes zero, whatever takes its place when it is frozen.
        """
        whole = has_room(self.spectra, memory_gb)
        found = self.sums("score", partial(streaming_sums, whole=whole, to_zero=to_zero))
        self._know_means(found)
        swaps = self.plan.reference in ("resample", "pair")
        values = split_table(self.spectra, torch.tensor(self.means.table()))
        effects = []
        for name, s in self.spectra.items():
            cross, slopes = found["cross"][name], found["slopes"][name]
            assert isinstance(cross, CrossSums)
            assert isinstance(slopes, ActivationSums)
            total = -cross.on(s)
            if not (swaps or to_zero):
                total = total + (values[name] * s.slopes(slopes.total)).sum(0)
            effects.append(total / self.plan.n_examples)
        return {"estimate" if to_zero else "effect": effects}

    def mean_pass(self) -> None:
        """A forward pass for the means that single effects are measured against."""
        if self.plan.means is None:
            self._know_means(self.sums("means", mean_sums))

    def _know_means(self, found: Collected) -> None:
        if self.plan.means is None:
            means = means_of_sums(self.spectra, self.plan, found["means"])
            self.plan = replace(self.plan, means=means)

    def per_example(self, criterion: str) -> Statistics:
        """Mean, spread and worst of single effects; takes a forward pass for the means first."""
        self.mean_pass()
        by_position = criterion in _BY_POSITION
        axis = Positions.of(self.plan.batches, self.plan.positions.n_positions)
        varies = self._varying(criterion, axis) if by_position else None
        sums = self.sums("score", partial(single_sums, axis=axis, varies=varies))
        n = self.plan.n_examples
        found = [one for one in sums["effects"].values() if isinstance(one, EffectSums)]
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

    def by_peer(self, criterion: str, steps: int) -> Statistics:
        """Scores of other methods (:mod:`eigenlens.scoring.peers`)."""
        self.mean_pass()
        start = None
        if criterion == "eap_ig_inputs" and self.plan.reference in ("mean", "shared"):
            start = embedding_means(self.plan, self.sums("embeddings", embedding_sums))
        work = partial(peer_sums, criterion=criterion, steps=steps, start=start)
        found = peer_effects(self.sums(criterion, work), criterion)
        return {"estimate": [found[name] / self.plan.n_examples for name in self.spectra]}

    def _varying(self, criterion: str, axis: Positions) -> Bool[Tensor, " row"]:
        varies = varying_positions(self.plan.batches, axis)
        if criterion == "max_everywhere":
            varies[:] = True
        if not varies.any():
            raise ValueError("All examples have the same prompt: no activation varies.")
        return varies.to(self.plan.batches[0].tokens.device)
