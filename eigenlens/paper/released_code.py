"""What the paper's released code computes, each of its deviations behind a switch.

The released code (arXiv 2404.03147, repository tvergara/eigenpruning) scores and freezes otherwise
than the paper says. With every switch on, this module does what that code does, with our passes
instead of its loop over singular values; each switch turned off replaces one step by ours. So the
effect of each can be measured (``eigenlens experiment estimators``). Not for use beyond that.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import WeightMatrix
from eigenlens.metrics import Metric, answer_logits, answer_loss, precise
from eigenlens.provenance import Provenance, text_hash
from eigenlens.scoring import Scores
from eigenlens.scoring.scorer import (
    component_table,
    forward_backward,
    position_counts,
    position_range,
    position_rows,
)
from eigenlens.selection import select
from eigenlens.spectra import Spectra, Spectrum
from eigenlens.tasks.batches import Batch, make_batches


class ReferenceCode(BaseModel):
    """The deviations of the released code; all but the fine-tuning are on, as in its main script.

    Attributes:
        one_batch: scores and means come from a single batch of the shuffled training data.
        rolled_reference: freezing is judged against the activation of the neighbour in the batch
            instead of the mean.
        worst_case: components rank by their largest effect over examples and all positions, the
            constant first token included, instead of by their mean effect.
        first_token: the loss is that of the first answer token only.
        raw_inputs: activations are taken before the norm, and those of W_out before the activation
            function.
        global_quota: every kind of matrix takes its quota from the front of one list over all
            kinds, so that the largest quota is what is frozen, of whatever kind.
        summed_bias: the bias is the sum over token positions, the same at each (W_O excepted).
        finetune: one epoch of Adam on all weights (learning rate 0.01) before scoring.
        batch_size: examples per batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    one_batch: bool = True
    rolled_reference: bool = True
    worst_case: bool = True
    first_token: bool = True
    raw_inputs: bool = True
    global_quota: bool = True
    summed_bias: bool = True
    finetune: bool = False
    batch_size: int = Field(default=5, ge=2)


def first_token_loss(
    logits: Float[Tensor, "batch answer d_vocab"], batch: Batch
) -> Float[Tensor, " batch"]:
    """Negative log-likelihood of the first answer token, in nats."""
    return -logits[:, 0].log_softmax(-1).gather(-1, batch.answer[:, :1])[:, 0]


def score_like_reference(
    model: TransformerBridge,
    spectra: Spectra,
    data: Dataset,
    switches: ReferenceCode | None = None,
    *,
    seed: int = 0,
) -> Scores:
    """Scores and means as the released code has them.

    Args:
        model: in eval mode; fine-tuned before, if that is wanted (:func:`finetuned`).
        spectra: its decomposition.
        data: training examples.
        switches: deviations to keep; all but the fine-tuning by default.
        seed: of the shuffling.

    Raises:
        ValueError: a model whose raw inputs have no hook; fewer than two examples.
    """
    switches = switches or ReferenceCode()
    order = np.random.default_rng(seed).permutation(len(data))
    used = data.select(order[: switches.batch_size] if switches.one_batch else order)
    batches = make_batches(used, model, switches.batch_size, smallest=2)
    if switches.first_token:
        batches = [_prompts_only(batch) for batch in batches]
    passes = _Passes(model, spectra, batches, switches)
    worst, mean = passes.effects()
    table = component_table(list(spectra.values()), {"effect": mean, "worst": worst})
    return Scores(
        components=table,
        mean_activation=passes.biases(),
        positions=passes.positions,
        count=passes.count.cpu().numpy(),
        criterion="max" if switches.worst_case else "mean",
        reference="resample" if switches.rolled_reference else "mean",
        n_examples=len(used),
        provenance=Provenance.of(model, task_hash=text_hash(used.to_list()), seed=seed),
        spectra=spectra,
    )


def _prompts_only(batch: Batch) -> Batch:
    """The batch with one answer token, which is predicted and not read."""
    return replace(
        batch,
        tokens=batch.tokens[:, : batch.n_prompt],
        attention_mask=batch.attention_mask[:, : batch.n_prompt],
        answer=batch.answer[:, :1],
        answer_mask=batch.answer_mask[:, :1],
    )


def select_like_reference(
    scores: Scores, fraction: float, switches: ReferenceCode | None = None
) -> FrozenSet:
    """The lowest scores, with the quota of the released code."""
    switches = switches or ReferenceCode()
    if not switches.global_quota:
        return select(scores, fraction, within="matrix")
    largest = max(scores.components.groupby("matrix").size())
    return select(scores, count=int(largest * fraction))


@contextmanager
def finetuned(
    model: TransformerBridge,
    data: Dataset,
    *,
    batch_size: int = 5,
    lr: float = 0.01,
    seed: int = 0,
) -> Iterator[None]:
    """One epoch of Adam on all weights; on leaving, the weights are as before, bit for bit."""
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        model.requires_grad_(True)
        adam = torch.optim.Adam(model.parameters(), lr)
        order = np.random.default_rng(seed).permutation(len(data))
        for start in range(0, len(order), batch_size):
            rows = data.select(order[start : start + batch_size])
            for batch in make_batches(rows, model, batch_size):
                with torch.enable_grad():
                    loss = first_token_loss(precise(answer_logits(model, batch)), batch).mean()
                    adam.zero_grad()
                    loss.backward()
                adam.step()
        adam.zero_grad()
        model.requires_grad_(False)
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
                parameter.grad = None
                parameter.requires_grad_(required[name])


def raw_input_hook(model: TransformerBridge, matrix: WeightMatrix) -> str:
    """The hook whose value the released code takes for the input of ``matrix``.

    Raises:
        ValueError: the model has no such hook.
    """
    block = f"blocks.{matrix.layer}"
    wanted = {
        "W_Q": [f"{block}.ln1.hook_in"],
        "W_K": [f"{block}.ln1.hook_in"],
        "W_V": [f"{block}.ln1.hook_in"],
        "W_O": [matrix.hook_in],
        # Parallel blocks have one norm for both.
        "W_in": [f"{block}.ln2.hook_in", f"{block}.ln1.hook_in"],
        "W_gate": [f"{block}.ln2.hook_in", f"{block}.ln1.hook_in"],
        "W_out": [f"{block}.mlp.gate.hook_out", f"{block}.mlp.in.hook_out"],
    }[matrix.kind]
    for name in wanted:
        if name in model.hook_dict:
            return name
    raise ValueError(f"raw_inputs: this model has none of {', '.join(wanted)}.")


class _Passes:
    """Forward and backward passes over the batches, and what is kept of them."""

    def __init__(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        batches: list[Batch],
        switches: ReferenceCode,
    ) -> None:
        self._model = model
        self._spectra = list(spectra.values())
        self._batches = batches
        self._switches = switches
        self._hooks = {
            s.matrix.name: raw_input_hook(model, s.matrix)
            if switches.raw_inputs
            else s.matrix.hook_in
            for s in self._spectra
        }
        self.positions = position_range(batches)
        self.count = position_counts(batches, self.positions)
        # padding counts, as it does there
        self._rows = torch.zeros(len(self.positions), device=self.count.device)
        self._inputs = {
            s.matrix.name: s.u.new_zeros(len(self.positions), s.matrix.flat_weight.shape[0])
            for s in self._spectra
        }

    def effects(self) -> tuple[list[Tensor], list[Tensor]]:
        """Worst and mean effect of every component, one ``[head, rank]`` per matrix each."""
        for batch in self._batches:
            with torch.no_grad(), self._recording(batch) as inputs:
                answer_logits(self._model, batch)
            rows = position_rows(batch, self.positions)
            self._rows[rows] += len(batch)
            for name, value in inputs.items():
                self._inputs[name][rows] += value.sum(0)
        worst = {s.matrix.name: torch.full_like(s.sigma, -torch.inf) for s in self._spectra}
        total = {s.matrix.name: torch.zeros_like(s.sigma) for s in self._spectra}
        metric: Metric = first_token_loss if self._switches.first_token else answer_loss
        for batch in self._batches:
            with self._recording(batch) as inputs:
                add = partial(self._add, batch, inputs, worst, total)
                forward_backward(self._model, self._spectra, batch, metric, add)
        n = sum(len(batch) for batch in self._batches)
        return list(worst.values()), [value / n for value in total.values()]

    def biases(self) -> np.ndarray:
        """What takes the place of each activation, ``[component, position]``."""
        blocks = []
        for spectrum in self._spectra:
            means = spectrum.reads(self._mean_input(spectrum))
            if self._switches.summed_bias and spectrum.matrix.kind != "W_O":
                means = means.sum(0, keepdim=True).expand_as(means)
            blocks.append(means.flatten(1).T.cpu().numpy())
        return np.concatenate(blocks)

    def _mean_input(self, spectrum: Spectrum) -> Float[Tensor, "pos all_in"]:
        total = self._inputs[spectrum.matrix.name]
        return total / self._rows.clamp_min(1)[:, None].to(total)

    def _add(
        self,
        batch: Batch,
        inputs: dict[str, Tensor],
        worst: dict[str, Tensor],
        total: dict[str, Tensor],
        spectrum: Spectrum,
        x: Tensor,
        g: Tensor,
        values: Tensor,
    ) -> None:
        name = spectrum.matrix.name
        raw = inputs[name]
        rows = position_rows(batch, self.positions)
        reference = raw.roll(1, 0) if self._switches.rolled_reference else None
        if reference is None:
            reference = self._mean_input(spectrum)[rows].expand_as(raw)
        effect = spectrum.reads(reference - raw) * spectrum.writes(g)
        worst[name] = torch.maximum(worst[name], effect.amax((0, 1)))
        total[name] += effect.sum((0, 1))

    @contextmanager
    def _recording(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        inputs: dict[str, Tensor] = {}

        def keep(spectrum: Spectrum, value: Tensor, hook: Any) -> None:
            inputs[spectrum.matrix.name] = value.detach().flatten(2).to(spectrum.sigma.dtype)

        hooks = [(self._hooks[s.matrix.name], partial(keep, s)) for s in self._spectra]
        with self._model.hooks(fwd_hooks=hooks):
            yield inputs
