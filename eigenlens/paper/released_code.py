"""What the paper's released code computes, each of its deviations behind a switch.

The released code (arXiv 2404.03147, repository tvergara/eigenpruning) scores and freezes otherwise
than the paper says. With every switch on, this module does what that code does, with our passes
instead of its loop over singular values; each switch turned off replaces one step by ours. So the
effect of each can be measured (``eigenlens experiment estimators``). Not for use beyond that.

It works with inputs of maps, ``σ_i x · u_i``, and gradients at their outputs; its means are handed
on in the units of all others, as coordinates of the small side.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.decomposition import decompose
from eigenlens.evaluation import Comparison, Evaluation, compare, evaluate
from eigenlens.far_side import MapDirections, map_directions
from eigenlens.freezing import freeze
from eigenlens.frozen_set import FrozenSet
from eigenlens.matrices import Site, WeightMatrix
from eigenlens.metrics import Metric, answer_logits, answer_loss, precise
from eigenlens.passes import FiniteCheck, forward_backward
from eigenlens.position_means import PositionMeans, Positions
from eigenlens.scoring import Scores
from eigenlens.search import SearchResult, one_shot
from eigenlens.selection import select
from eigenlens.spectra import Spectra, Spectrum
from eigenlens.tasks import Task
from eigenlens.tasks.batches import Batch, make_batches
from eigenlens.weights import requiring_grad, restored


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
    spectra = spectra.on(model)
    passes = _Passes(model, spectra, batches, switches)
    worst, mean = passes.effects()
    return Scores.made_of(
        spectra,
        {"effect": mean, "worst": worst},
        passes.means(),
        used,
        criterion="max_everywhere" if switches.worst_case else "mean",
        reference="resample" if switches.rolled_reference else "mean",
        seed=seed,
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


def choose_like_reference(
    model: TransformerBridge,
    scores: Scores,
    validation: Dataset,
    switches: ReferenceCode,
    fractions: Sequence[float],
    *,
    batch_size: int = 50,
) -> SearchResult:
    """The best of several quotas on validation; freezing nothing is no choice."""
    return one_shot(
        model,
        scores,
        validation,
        fractions=fractions,
        choose=partial(select_like_reference, switches=switches),
        or_nothing=False,
        batch_size=batch_size,
    )


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
    with restored(model.parameters()):
        with requiring_grad(model.parameters()):
            adam = torch.optim.Adam(model.parameters(), lr)
            order = np.random.default_rng(seed).permutation(len(data))
            for start in range(0, len(order), batch_size):
                rows = data.select(order[start : start + batch_size])
                for batch in make_batches(rows, model, batch_size):
                    with torch.enable_grad():
                        logits = precise(answer_logits(model, batch))
                        adam.zero_grad()
                        first_token_loss(logits, batch).mean().backward()
                    adam.step()
        yield


@dataclass(frozen=True)
class ReleasedRun:
    """What the released code's whole procedure comes to.

    Attributes:
        before, after: test split, unedited and frozen (fine-tuned too, where that is on).
        comparison: the two, paired.
        scores: of every component.
        search: the components that were frozen, and what each fraction did on validation.
    """

    before: Evaluation
    after: Evaluation
    comparison: Comparison
    scores: Scores
    search: SearchResult


def run_like_released(
    model: TransformerBridge,
    task: Task,
    switches: ReferenceCode | None = None,
    *,
    fractions: Sequence[float] = (0.3,),
    matrices: Sequence[str] | None = ("W_K",),
    seed: int = 0,
    batch_size: int = 50,
) -> ReleasedRun:
    """Score, select and freeze as the released code does; its main script freezes 30 % of the keys.

    Args:
        model: in eval mode; it is left as it was.
        task: scored on its train split; validation chooses among fractions, test is measured.
        switches: deviations to keep; all but the fine-tuning by default.
        fractions: quotas to choose from.
        matrices: kinds to freeze components of; all for ``None``.
        seed: of the shuffling, and of the bootstrap of the comparison.
        batch_size: examples per pass of what is measured.

    Raises:
        ValueError: a model whose raw inputs have no hook; fewer than two examples; no fraction.
    """
    switches = switches or ReferenceCode()
    before = evaluate(model, task.test, batch_size=batch_size, progress=False)
    with ExitStack() as undo:
        if switches.finetune:
            tuned = finetuned(model, task.train, batch_size=switches.batch_size, seed=seed)
            undo.enter_context(tuned)
        spectra = decompose(model, matrices, cache=not switches.finetune, progress=False)
        scores = score_like_reference(model, spectra, task.train, switches, seed=seed)
        found = choose_like_reference(
            model, scores, task.validation, switches, fractions, batch_size=batch_size
        )
        with freeze(model, found.frozen):
            after = evaluate(model, task.test, batch_size=batch_size, progress=False)
    return ReleasedRun(before, after, compare(before, after, seed=seed), scores, found)


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
        self._spectra = spectra
        self._batches = batches
        self._switches = switches
        maps = [s.site.find(model) for s in spectra.values()]
        raw = switches.raw_inputs
        self._hooks = {m.name: raw_input_hook(model, m) if raw else m.hook_in for m in maps}
        self._outputs = [matrix.site_on("out") for matrix in maps]
        self._directions = {name: _whole(model, s) for name, s in spectra.items()}
        self._positions = Positions.of(batches)
        n_rows = len(self._positions) + 1
        # padding counts, as it does there
        self._seen = torch.zeros(n_rows, device=batches[0].tokens.device)
        self._inputs = {
            name: d.reads.new_zeros(n_rows, len(d.reads)) for name, d in self._directions.items()
        }

    def effects(self) -> tuple[np.ndarray, np.ndarray]:
        """Worst and mean effect of every component."""
        finite = FiniteCheck()
        for batch in self._batches:
            with torch.no_grad(), self._recording() as inputs:
                finite.add("logits", answer_logits(self._model, batch), batch)
            rows = self._positions.of_batch(batch)
            self._seen[rows] += len(batch)
            for name, value in inputs.items():
                self._inputs[name][rows] += value.sum(0)
        total = {name: torch.zeros_like(d.offset) for name, d in self._directions.items()}
        worst = {name: torch.full_like(value, -torch.inf) for name, value in total.items()}
        metric: Metric = first_token_loss if self._switches.first_token else answer_loss
        for batch in self._batches:
            with self._recording() as inputs:
                add = partial(self._add, batch, inputs, worst, total)
                forward_backward(self._model, self._outputs, batch, metric, add, finite)
        finite.check()
        n = sum(len(batch) for batch in self._batches)
        return _joined(worst.values()), _joined(total.values()) / n

    def means(self) -> PositionMeans:
        """What takes the place of each coordinate."""
        blocks = []
        for name, spectrum in self._spectra.items():
            d = self._directions[name]
            means = self._mean_input(name)[:-1] @ d.reads
            if self._switches.summed_bias and spectrum.site.kind != "W_O":
                means = means.sum(0, keepdim=True).expand_as(means)
            blocks.append((means + d.offset).T.cpu())
        values = torch.cat(blocks).numpy()
        count = self._positions.count(self._batches)[:-1].cpu().numpy()
        fallback = values @ (count / count.sum()).astype(values.dtype)
        return PositionMeans(self._positions, count, values, fallback)

    def _mean_input(self, name: str) -> Float[Tensor, "row all_in"]:
        total = self._inputs[name]
        return total / self._seen.clamp_min(1)[:, None].to(total)

    def _add(
        self,
        batch: Batch,
        inputs: dict[str, Tensor],
        worst: dict[str, Tensor],
        total: dict[str, Tensor],
        site: Site,
        y: Tensor,
        g: Tensor,
        values: Tensor,
    ) -> None:
        raw, d = inputs[site.name], self._directions[site.name]
        if self._switches.rolled_reference:
            moved = raw.roll(1, 0) - raw
        else:
            moved = self._mean_input(site.name)[self._positions.of_batch(batch)] - raw
        effect = (moved @ d.reads) * (g.flatten(2).to(d.writes) @ d.writes.mT)
        worst[site.name] = torch.maximum(worst[site.name], effect.amax((0, 1)))
        total[site.name] += effect.sum((0, 1))

    @contextmanager
    def _recording(self) -> Iterator[dict[str, Tensor]]:
        """The inputs that a pass inside the block sees, by matrix."""
        inputs: dict[str, Tensor] = {}

        def keep(name: str, value: Tensor, hook: Any) -> None:
            inputs[name] = value.detach().flatten(2).to(self._inputs[name])

        hooks = [(hook, partial(keep, name)) for name, hook in self._hooks.items()]
        with self._model.hooks(fwd_hooks=hooks):
            yield inputs


def _whole(model: TransformerBridge, spectrum: Spectrum) -> MapDirections:
    """Both sides of all components of one map."""
    head, index = np.indices(tuple(spectrum.sigma.shape)).reshape(2, -1)
    return map_directions(model, spectrum, head, index)


def _joined(parts: Iterable[Tensor]) -> np.ndarray:
    return torch.cat([part.cpu() for part in parts]).double().numpy()
