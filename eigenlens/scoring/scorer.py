"""The passes over the data that fill the accumulators, through TransformerLens' hooks.

Sign: ``delta_loss < 0`` predicts that freezing the component lowers the loss.
Cost: one forward and one backward pass per batch; criteria other than ``mean`` and standard errors
take one forward pass more, for the means that single effects are measured against, unless these
are given.
Memory: per matrix the sums of :mod:`eigenlens.scoring.accumulators`, whatever the number of
examples; inputs of a batch are held until the backward pass has used them. What is kept per
position is ``n_positions`` + answer tokens + 1 numbers per component, however long the prompts: of
SmolLM2-135M (97,920 components, float32) 0.4 MB a position, so 200 MB for 512 positions of their
own, and 13 MB for ``n_positions=32``. What a batch takes grows with ``batch_size`` × its longest
prompt.
Source: Eigenpruning (arXiv 2404.03147), section 3; attribution patching (Nanda, 2023).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.matrices import weight_matrices
from eigenlens.metrics import Metric, answer_logits, answer_loss, check_eval_mode, precise
from eigenlens.provenance import Provenance, text_hash
from eigenlens.scoring.accumulators import CrossMoments, EffectMoments, InputMeans
from eigenlens.scoring.scores import (
    COMPONENT,
    CRITERIA,
    REFERENCES,
    STATISTICS,
    Criterion,
    Reference,
    Scores,
)
from eigenlens.spectra import Spectra, Spectrum
from eigenlens.tasks.batches import Batch, make_batches

Handler = Callable[[Spectrum, Float[Tensor, "batch pos all_in"]], None]
Means = Callable[[Spectrum], Float[Tensor, "pos head rank"] | None]
GradHandler = Callable[
    [
        Spectrum,
        Float[Tensor, "batch pos all_in"],
        Float[Tensor, "batch pos all_out"],
        Float[Tensor, " batch"],
    ],
    None,
]


def score(
    model: TransformerBridge,
    spectra: Spectra,
    data: Dataset,
    *,
    criterion: Criterion | str = "mean",
    reference: Reference | str = "mean",
    metric: Metric = answer_loss,
    stderr: bool = False,
    z: float = 1.0,
    constant_positions: bool = False,
    n_positions: int | None = None,
    means: Scores | None = None,
    matrices: Iterable[str] | None = None,
    layers: Iterable[int] | None = None,
    batch_size: int = 50,
    seed: int = 0,
    progress: bool = True,
) -> Scores:
    """Score the effect of freezing every component on a metric.

    Args:
        model: in eval mode.
        spectra: its decomposition.
        data: examples with the columns ``prompt`` and ``answer``.
        criterion: what ranks components: ``mean`` effect over examples, ``max`` (worst effect over
            examples and positions), ``ucb`` (mean + ``z`` · standard deviation), ``fisher`` (mean
            + ½ mean square: the empirical-Fisher second-order estimate of the loss), ``margin``
            (the loss if freezing moves the answer's log-odds linearly), ``position_fisher`` (as
            ``fisher``, with positions apart). The last three suppose that the metric is a negative
            log-likelihood.
        reference: what freezing puts in place of an activation: its per-position ``mean``,
            ``zero``, or that of another example of the batch (``resample``).
        metric: a number per example from ``(logits at the answer positions, batch)``; the loss
            (negative log-likelihood of the answer, nats) by default.
        stderr: also compute standard errors over examples.
        z: standard deviations that ``ucb`` adds.
        constant_positions: let ``max`` run over positions where all examples have read the same
            tokens, too, as the paper's code does: no maximum is then below zero.
        n_positions: how many of the last positions of the prompt have a mean of their own; all
            earlier ones share one (for long prompts of many lengths). ``None``: every position.
        means: scores of the same components whose means freezing puts in place, where those of
            ``data`` under the model of now are not meant: scoring under an edit, or on a part of
            the examples. Saves the forward pass for the means; ``n_positions`` is then theirs.
        matrices, layers: score only these of ``spectra``.
        batch_size: examples per pass.
        seed: of the resampling.
        progress: show a progress bar.

    Raises:
        ValueError: an unknown criterion, reference, matrix kind or layer; a negative
            ``n_positions``; a model in training mode or with other weights than ``spectra``;
            ``means`` of other components; an empty or untokenisable data set; prompts longer than
            the context; ``resample`` with a batch of one; NaN or infinite activations.
    """
    _check_choice("criterion", criterion, CRITERIA)
    _check_choice("reference", reference, REFERENCES)
    if n_positions is not None and n_positions < 0:
        raise ValueError(f"n_positions={n_positions} is negative.")
    provenance = Provenance.of(model, task_hash=text_hash(data.to_list()), seed=seed)
    _check_model(model, spectra, provenance)
    chosen = _chosen(model, spectra, matrices, layers)
    batches = make_batches(data, model, batch_size, smallest=2 if reference == "resample" else 1)
    if means is not None:
        _check_components(means, chosen)
        n_positions = means.n_positions
    scorer = _Scorer(model, chosen, batches, reference, metric, seed, progress, n_positions, means)
    one_pass = criterion == "mean" and not stderr
    components = scorer.streaming() if one_pass else scorer.per_example(constant_positions)
    return Scores(
        components=components,
        mean_activation=scorer.mean_activation(),
        positions=scorer.positions,
        count=scorer.count.cpu().numpy(),
        criterion=criterion,
        reference=reference,
        n_examples=len(data),
        provenance=provenance,
        z=z,
        bucketed=scorer.bucketed,
        spectra=Spectra(chosen, spectra.provenance),
    )


def _check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"Unknown {name} {value!r}; choose from {', '.join(known)}.")


def _check_model(model: TransformerBridge, spectra: Spectra, provenance: Provenance) -> None:
    check_eval_mode(model)
    if spectra.provenance.model_fingerprint != provenance.model_fingerprint:
        raise ValueError("The spectra belong to a model with other weights: call decompose again.")


def _chosen(
    model: TransformerBridge,
    spectra: Spectra,
    matrices: Iterable[str] | None,
    layers: Iterable[int] | None,
) -> list[Spectrum]:
    if matrices is None and layers is None:
        return list(spectra.values())
    names = [matrix.name for matrix in weight_matrices(model, matrices, layers)]
    chosen = [spectra[name] for name in names if name in spectra]
    if not chosen:
        raise ValueError(f"None of {', '.join(names[:3])} … is in the spectra: decompose them.")
    return chosen


def _check_components(means: Scores, spectra: list[Spectrum]) -> None:
    wanted = component_table(spectra, {})[COMPONENT]
    if not wanted.equals(means.components[COMPONENT].reset_index(drop=True)):
        raise ValueError(
            f"The means are of {len(means):,} components, and not of the {len(wanted):,} to score: "
            "score the same matrices and layers."
        )


def position_range(batches: Sequence[Batch], n_positions: int | None = None) -> range:
    """All positions that occur, counted from the end of the prompt.

    With ``n_positions`` at most one more than these of the prompt: the first stands for itself and
    all earlier ones.
    """
    first = min(batch.positions.start for batch in batches)
    if n_positions is not None:
        first = max(first, -n_positions - 1)
    return range(first, max(batch.positions.stop for batch in batches))


def position_counts(batches: Sequence[Batch], positions: range) -> Int[Tensor, " pos"]:
    """Number of tokens at each position."""
    count = torch.zeros(len(positions), dtype=torch.int64, device=batches[0].tokens.device)
    for batch in batches:
        count.index_add_(0, position_rows(batch, positions), batch.attention_mask.sum(0))
    return count


def position_rows(batch: Batch, positions: range) -> Int[Tensor, " column"]:
    """Rows of per-position sums that the columns of ``batch`` belong to."""
    start, stop = batch.positions.start, batch.positions.stop
    column = torch.arange(start, stop, device=batch.tokens.device)
    return (column - positions.start).clamp_min(0)


def varying_positions(batches: Sequence[Batch], positions: range) -> Bool[Tensor, " pos"]:
    """Positions that at least two examples reach by different tokens.

    Elsewhere every activation equals its mean, and an effect of exactly zero says nothing: a
    maximum over such positions would hide harm.
    """
    prefixes: list[set[int]] = [set() for _ in positions]
    for batch in batches:
        rows = position_rows(batch, positions).tolist()
        for tokens, there in zip(batch.tokens.tolist(), batch.attention_mask.tolist(), strict=True):
            prefix = 0
            for column, token in enumerate(tokens):
                if there[column]:
                    prefix = hash((prefix, token))
                    prefixes[rows[column]].add(prefix)
    return torch.tensor([len(seen) > 1 for seen in prefixes])


class _Scorer:
    """One scoring run: the batches, their positions, and the sums per matrix."""

    def __init__(
        self,
        model: TransformerBridge,
        spectra: list[Spectrum],
        batches: list[Batch],
        reference: str,
        metric: Metric,
        seed: int,
        progress: bool,
        n_positions: int | None,
        given: Scores | None,
    ) -> None:
        self.model = model
        self.spectra = spectra
        self.batches = batches
        self.reference = reference
        self.metric = metric
        self.progress = progress
        self.generator = torch.Generator().manual_seed(seed)
        self.positions = position_range(batches, n_positions)
        self.bucketed = n_positions is not None and self.positions.start < -n_positions
        self.count = position_counts(batches, self.positions)
        self.n_examples = sum(len(batch) for batch in batches)
        self.inputs = {s.matrix.name: InputMeans.zeros(s, len(self.positions)) for s in spectra}
        self.given = _reads_of(given, spectra, self.positions) if given is not None else {}

    def streaming(self) -> pd.DataFrame:
        """Mean effects from one forward and one backward pass per batch."""
        means: Means = self._mean_reads if self.reference == "mean" else lambda spectrum: None
        moments = {s.matrix.name: CrossMoments.zeros(s, len(self.positions)) for s in self.spectra}
        for batch in self._bar("score"):
            partner = self._partner(batch)
            rows = position_rows(batch, self.positions)

            def add(
                spectrum: Spectrum,
                x: Tensor,
                g: Tensor,
                values: Tensor,
                rows: Tensor = rows,
                batch: Batch = batch,
                partner: Tensor | None = partner,
            ) -> None:
                x, g = _without_padding(x, batch), _without_padding(g, batch)
                if not self.given:
                    self.inputs[spectrum.matrix.name].update(rows, x)
                if partner is not None:
                    x = x - _resampled(x, batch, partner)
                moments[spectrum.matrix.name].update(rows, x, g)

            forward_backward(self.model, self.spectra, batch, self.metric, add)
        effects = [
            moments[s.matrix.name].effects(s, self.n_examples, means(s)) for s in self.spectra
        ]
        return component_table(self.spectra, {"effect": effects})

    def per_example(self, constant_positions: bool) -> pd.DataFrame:
        """Mean, spread and worst of single effects; takes a forward pass for the means first."""
        for batch in self._bar("means") if not self.given else ():
            rows = position_rows(batch, self.positions)
            record_inputs(self.model, self.spectra, batch, partial(self._add_inputs, batch, rows))
        means = {s.matrix.name: self._mean_reads(s) for s in self.spectra}
        varies = varying_positions(self.batches, self.positions).to(self.count.device)
        varies |= constant_positions
        if not varies.any():
            raise ValueError("All examples have the same prompt: no activation varies.")
        moments = {s.matrix.name: EffectMoments.zeros(s) for s in self.spectra}
        for batch in self._bar("score"):
            partner = self._partner(batch)
            rows = position_rows(batch, self.positions)
            here = varies[rows] & batch.attention_mask

            def add(
                spectrum: Spectrum,
                x: Tensor,
                g: Tensor,
                values: Tensor,
                rows: Tensor = rows,
                batch: Batch = batch,
                partner: Tensor | None = partner,
                here: Tensor = here,
            ) -> None:
                name = spectrum.matrix.name
                a = spectrum.reads(x)
                if partner is not None:
                    reference = _resampled(a, batch, partner)
                elif self.reference == "mean":
                    reference = means[name][rows]
                else:
                    reference = torch.zeros_like(a)
                effect = (reference - a) * spectrum.writes(g)
                moments[name].update(_without_padding(effect, batch), here, values)

            forward_backward(self.model, self.spectra, batch, self.metric, add)
        found = [moments[s.matrix.name] for s in self.spectra]
        return component_table(
            self.spectra,
            {
                "effect": [m.total / self.n_examples for m in found],
                "margin": [m.margin / self.n_examples for m in found],
                "std": [m.std(self.n_examples) for m in found],
                "position_square": [m.position_square / self.n_examples for m in found],
                "worst": [m.worst for m in found],
            },
        )

    def mean_activation(self) -> np.ndarray:
        """Mean projected activations, ``[component, position]``; zero for the zero reference."""
        blocks = []
        for spectrum in self.spectra:
            means = self._mean_reads(spectrum)
            if self.reference == "zero":
                means = torch.zeros_like(means)
            blocks.append(means.flatten(1).T.cpu().numpy())
        return np.concatenate(blocks)

    def _mean_reads(self, spectrum: Spectrum) -> Float[Tensor, "pos head rank"]:
        if self.given:
            return self.given[spectrum.matrix.name]
        return spectrum.reads(self.inputs[spectrum.matrix.name].means(self.count))

    def _add_inputs(self, batch: Batch, rows: Tensor, spectrum: Spectrum, x: Tensor) -> None:
        self.inputs[spectrum.matrix.name].update(rows, _without_padding(x, batch))

    def _partner(self, batch: Batch) -> Int[Tensor, " batch"] | None:
        """For ``resample``: another example of the batch for each (a rotation by a random step)."""
        if self.reference != "resample":
            return None
        step = int(torch.randint(1, len(batch), (), generator=self.generator))
        return torch.arange(len(batch), device=batch.tokens.device).roll(step)

    def _bar(self, name: str) -> Iterator[Batch]:
        return iter(tqdm(self.batches, desc=name, unit="batch", disable=not self.progress))


def _reads_of(
    scores: Scores, spectra: list[Spectrum], positions: range
) -> dict[str, Float[Tensor, "pos head rank"]]:
    """The means of ``scores`` at ``positions``, by matrix."""
    values = torch.tensor(scores.means_at(positions)).split([s.sigma.numel() for s in spectra])
    return {
        s.matrix.name: rearrange(
            part.to(s.sigma), "(head rank) pos -> pos head rank", head=s.matrix.n_heads
        )
        for s, part in zip(spectra, values, strict=True)
    }


def _without_padding(values: Tensor, batch: Batch) -> Tensor:
    if not batch.is_padded:
        return values
    mask = batch.attention_mask.view(*batch.attention_mask.shape, *[1] * (values.ndim - 2))
    return torch.where(mask, values, 0)


def _resampled(values: Tensor, batch: Batch, partner: Tensor) -> Tensor:
    """Values of the partner, and one's own where the partner has no token."""
    there = batch.attention_mask[partner]
    mask = there.view(*there.shape, *[1] * (values.ndim - 2))
    return torch.where(mask, values[partner], values)


def component_table(spectra: list[Spectrum], statistics: dict[str, list[Tensor]]) -> pd.DataFrame:
    def column(parts: Iterable[Tensor]) -> np.ndarray:
        return torch.cat([part.flatten() for part in parts]).double().cpu().numpy()

    sizes = [s.sigma.numel() for s in spectra]
    table = pd.DataFrame(
        {
            "layer": np.repeat([s.matrix.layer for s in spectra], sizes),
            "matrix": np.repeat([s.matrix.kind for s in spectra], sizes),
            "head": np.concatenate(
                [np.repeat(np.arange(s.sigma.shape[0]), s.sigma.shape[1]) for s in spectra]
            ),
            "index": np.concatenate(
                [np.tile(np.arange(s.sigma.shape[1]), s.sigma.shape[0]) for s in spectra]
            ),
            "sigma": column(s.sigma for s in spectra),
        }
    )
    for name in STATISTICS:
        table[name] = column(statistics[name]) if name in statistics else np.nan
    return table


def record_inputs(
    model: TransformerBridge, spectra: Iterable[Spectrum], batch: Batch, handle: Handler
) -> None:
    """Run ``batch`` forward and hand every matrix's input to ``handle(spectrum, x)``."""
    hooks = [(s.matrix.hook_in, partial(_on_input, s, handle)) for s in spectra]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        _check_finite(answer_logits(model, batch), "logits", batch)


def _on_input(spectrum: Spectrum, handle: Handler, value: Tensor, hook: Any) -> None:
    handle(spectrum, _flat(value, spectrum))


def forward_backward(
    model: TransformerBridge,
    spectra: Iterable[Spectrum],
    batch: Batch,
    metric: Metric,
    handle: GradHandler,
) -> Float[Tensor, " batch"]:
    """One forward and one backward pass of the summed metric.

    Every matrix's input and output gradient go to ``handle(spectrum, x, ∂metric/∂y, metric)`` as
    the backward pass reaches it. No gradient of a weight is computed, and nothing below the first
    matrix is differentiated.

    Returns:
        The metric of each example.
    """
    spectra = list(spectra)
    held: dict[str, Tensor] = {}

    def keep(spectrum: Spectrum, value: Tensor, hook: Any) -> None:
        held[spectrum.matrix.name] = _flat(value.detach(), spectrum)

    def consume(spectrum: Spectrum, grad: Tensor, hook: Any) -> None:
        x = held.pop(spectrum.matrix.name)
        handle(spectrum, x, _flat(grad.detach(), spectrum), values[-1])

    leaves: list[Tensor] = []
    values: list[Tensor] = []

    def start(value: Tensor, hook: Any) -> Tensor:
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    first = min(s.matrix.layer for s in spectra)
    fwd: list[tuple[str, Callable[..., Any]]] = [(f"blocks.{first}.hook_in", start)]
    fwd += [(s.matrix.hook_in, partial(keep, s)) for s in spectra]
    bwd = [(s.matrix.hook_out, partial(consume, s)) for s in spectra]
    with torch.enable_grad(), model.hooks(fwd_hooks=fwd, bwd_hooks=bwd):
        metrics = metric(precise(answer_logits(model, batch)), batch)
        _check_finite(metrics, "metric", batch)
        values.append(metrics.detach())
        # grad() of the leaf, not backward(): weights that require gradients get none.
        torch.autograd.grad(metrics.sum(), leaves)
    return values[-1]


def _flat(value: Tensor, spectrum: Spectrum) -> Tensor:
    """Heads side by side, in the precision of the sums."""
    return value.flatten(2).to(spectrum.sigma.dtype)


def _check_finite(values: Tensor, what: str, batch: Batch) -> None:
    finite = torch.isfinite(values.flatten(1).sum(1) if values.ndim > 1 else values)
    if not finite.all():
        example = batch.indices[int((~finite).nonzero()[0])]
        raise ValueError(
            f"The {what} of example {example} is NaN or infinite: the model's activations overflow "
            "or hold NaN. Try dtype=float32, and check the weights."
        )
