"""Train a gate per component, and let it become open or shut.

A gate is ``z = sigmoid(β s)``; the vector s is trained by Adam with the model's weights fixed, and
β grows from 1 to ``sharpness`` over the steps, which drives every gate to 0 or 1 (other ways to get
there: :mod:`eigenlens.search.relaxation`). A price per open gate keeps the set small, and where
something is to be protected, away from components that other text depends on, at the constants that
it minds least; dropping some gates in every step keeps it robust. One step is one forward and one
backward pass of a minibatch (:mod:`eigenlens.gates`); after a quarter of them only the most open
gates go on, which makes a step as cheap as the model's own passes.

Source of the idea that a gate's gradient is a component's score: this package.
"""

import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.evaluation import Evaluation, preference
from eigenlens.frozen_set import FrozenSet
from eigenlens.gates import Gates, faster_products
from eigenlens.metrics import answer_loss
from eigenlens.provenance import keeping_weights
from eigenlens.scoring import Scores
from eigenlens.search.foretelling import foretold
from eigenlens.search.protection import Protection
from eigenlens.search.relaxation import RelaxationName, relaxation
from eigenlens.search.result import Checkpoint, SearchResult, best_step, look, trace_row
from eigenlens.search.sufficiency import Sufficiency
from eigenlens.tasks.batches import Batch, make_batches

_SHARPNESS_FROZEN, _SHARPNESS_ATTENUATED = 100.0, 10.0
_OFF = 1e-3  # a gate below this is left out: its component is not edited
_ALL_UNTIL = 0.25  # share of the steps in which every component is a candidate
_FEWEST_CANDIDATES = 2000
_LAST_RATE = 0.1  # the learning rate ends at this share of its start


class LearnedConfig(BaseModel):
    """Options of :func:`learned`; what is out of range is refused.

    Attributes:
        attenuate: return the gates as they are (components are attenuated); by default those above
            ½ are frozen and the others left alone.
        steps: optimiser steps, one minibatch each.
        lr: learning rate of s; falls to a tenth along a cosine.
        sparsity: price of opening all gates, in nats of training loss.
        dropout: share of the gates that are shut for a step, drawn anew each time. It makes sets
            that do not hang on single components, and these carry over better to unseen examples.
        relax: how gates come to be open or shut: ``sharpened``, ``hard_concrete`` or ``penalised``.
            The study ``gates`` compares them.
        sharpness: of ``sharpened``, β at the end; by default 100, and 10 with ``attenuate``,
            which needs no decision.
        averaging: s is averaged over the last steps with this factor (exponentially), which
            evens out the noise of minibatches; 0 takes s as it is.
        start: value of a gate at the beginning, in (0, 1).
        spread: how far scores set gates apart at the beginning: s is higher by this much for the
            lowest score and lower by as much for the highest, in the order of the scores.
        candidates: share of the gates, those of largest s, that go on after the first quarter of
            the steps (2,000 at least); the others stay shut, and cost nothing more. 1 keeps all.
        every: steps between two looks at the validation data.
        patience: looks without improvement after which the search stops.
        batch_size: examples per minibatch.
        seed: of the order of examples.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    attenuate: bool = False
    steps: int = Field(default=120, ge=1)
    lr: float = Field(default=0.1, gt=0)
    sparsity: float = Field(default=3.0, ge=0)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    relax: RelaxationName = "sharpened"
    sharpness: float | None = Field(default=None, ge=1)
    averaging: float = Field(default=0.95, ge=0, lt=1)
    start: float = Field(default=0.05, gt=0, lt=1)
    spread: float = Field(default=0.0, ge=0)
    candidates: float = Field(default=0.06, gt=0, le=1)
    every: int = Field(default=10, ge=1)
    patience: int = Field(default=12, ge=1)
    batch_size: int = Field(default=50, ge=1)
    seed: int = 0

    @property
    def final_sharpness(self) -> float:
        """``sharpness``, or what it is by default."""
        return self.sharpness or (_SHARPNESS_ATTENUATED if self.attenuate else _SHARPNESS_FROZEN)


@keeping_weights
def learned(
    model: TransformerBridge,
    scores: Scores,
    train: Dataset,
    validation: Dataset,
    config: LearnedConfig | None = None,
    *,
    keep: bool = False,
    protect: Protection | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> SearchResult:
    """Train gates on the task, and return the best ones on validation.

    With ``keep``, what is looked for is not what harms the task but what suffices for it: the
    smallest set of components that keeps the model's own answers, right or wrong, when all others
    are frozen. The result freezes these others; what it keeps is
    :meth:`eigenlens.FrozenSet.kept`.

    Args:
        model: in eval mode.
        scores: of the unedited model: their components get gates, their means replace.
        train: examples to train the gates on.
        validation: examples to choose the stopping point on.
        config: options.
        keep: train on ``KL(unedited ‖ edited)`` over the answers, with ``sparsity`` the price of
            keeping all components. Gates start as ``start`` says: hardly anything is frozen.
            ``dropout`` and ``candidates``, which would keep components at random or for good, are
            not used.
        protect: data that the edit must leave as they are: gates cost what freezing is predicted to
            do to them, and only steps within the bound may be chosen.
        checkpoint: file that keeps the state after every look; a killed search goes on from it.
        progress: show a progress bar with validation loss and accuracy.

    Raises:
        ValueError: scores without directions; a checkpoint of another search; ``keep`` with
            ``attenuate`` or ``protect``.
    """
    config = config or LearnedConfig()
    if keep and (config.attenuate or protect is not None):
        raise ValueError(
            "keep=True freezes all that the task can do without: it takes neither attenuate=True, "
            "which decides about nothing, nor protect=, since the edit is for this task alone."
        )
    scores = scores.on(model)
    options = {"method": "learned", **config.model_dump(), "sharpness": config.final_sharpness}
    options |= {"keep": True} if keep else {}
    kept = Checkpoint(checkpoint, scores, train, validation, options, protect)
    saved = kept.load()
    harm, shift = _harm(scores, protect, saved, progress)
    scores = replace(scores, means=scores.means.shifted(shift.numpy()))
    prices = config.sparsity / len(scores) + harm
    enough = None
    if keep:
        enough = Sufficiency(model, train, validation, config.sparsity, config.batch_size)
    with Gates(model, scores) as gates:
        run = _Training(gates, scores, train, config, protect, prices, enough)
        search = _Search(model, run, validation, config, protect, enough)
        search.resume(saved)
        bar = tqdm(range(search.done + 1, config.steps + 1), desc="learned", disable=not progress)
        losses: list[Tensor] = []
        for step in foretold(bar, resumable=checkpoint is not None):
            if search.looks_since_best >= config.patience:
                break
            losses.append(run.step(step))
            if step % config.every and step != config.steps:
                continue
            found = search.look(step, float(torch.stack(losses).mean()))
            losses = []
            tensors, numbers = search.state()
            kept.save({**tensors, "harm": harm, "shift": shift}, numbers)
            bar.set_postfix(loss=f"{found.loss:.3f}", accuracy=f"{found.accuracy:.1%}")
    frozen = gated(scores, search.best)
    how = "kept" if keep else "attenuated" if config.attenuate else "frozen"
    table = best_step(search.trace, protect.bound if protect else math.inf)
    return SearchResult(
        f"learned ({how})", frozen, table, *([protect.table(frozen)] if protect else [])
    )


def _harm(
    scores: Scores,
    protect: Protection | None,
    saved: tuple[dict[str, Tensor], dict[str, Any]] | None,
    progress: bool,
) -> tuple[Float[Tensor, " component"], Float[Tensor, " component"]]:
    """What each open gate costs for the sake of others, in nats of loss, and by how much its mean
    is moved to cost no more.
    """
    if saved is not None:
        return saved[0]["harm"], saved[0]["shift"]
    none = torch.zeros(len(scores), dtype=torch.float64)
    if protect is None or not protect.price:
        return none, none.clone()
    harm = protect.harm(scores, progress=progress)
    shift = harm.best_shift() if protect.move_means else none
    return protect.price * harm.at(shift), shift


def gated(scores: Scores, gates: Float[Tensor, " component"]) -> FrozenSet:
    """The components whose gate is open, with their strengths."""
    strength = gates.detach().cpu().double().numpy()
    rows = np.flatnonzero(strength > _OFF)
    return FrozenSet.from_scores(scores, rows, strength[rows])


class _Training:
    """The gates under Adam, one minibatch a step."""

    def __init__(
        self,
        gates: Gates,
        scores: Scores,
        train: Dataset,
        config: LearnedConfig,
        protect: Protection | None,
        prices: Float[Tensor, " component"],
        enough: Sufficiency | None,
    ) -> None:
        self.gates = gates
        self.config = config
        self._train = train
        self._protect = protect
        self._enough = enough
        first = math.log(config.start / (1 - config.start))
        rank = torch.tensor(scores.delta_loss).argsort().argsort().to(gates.z)
        rank = rank / max(1, len(scores) - 1)
        s = first + config.spread * (1 - 2 * rank)
        # With keep, s stands for what is kept, which has the price: gates are what is left of 1.
        self.s = (s if enough is None else -s).requires_grad_()
        self.mean_s = self.s.detach().clone()
        self._relaxation = relaxation(config.relax, config.final_sharpness)
        self._prices = prices.to(self.mean_s)
        self._candidates = torch.ones_like(self.mean_s, dtype=torch.bool)
        self.adam = torch.optim.Adam([self.s], config.lr)

    def strength(self, step: int) -> Float[Tensor, " component"]:
        """The gates to measure at a step, of the averaged s."""
        found = self._relaxation.strength(self._shut(self.mean_s), self._done(step))
        return found if self._enough is None else 1 - found

    def _shut(self, s: Float[Tensor, " component"]) -> Float[Tensor, " component"]:
        """The same for candidates; the gates of all others are shut for good, at no price."""
        return s.masked_fill(~self._candidates, -torch.inf)

    def _done(self, step: int) -> float:
        return step / self.config.steps

    def step(self, step: int) -> Float[Tensor, ""]:
        """One optimiser step; returns the mean loss of its minibatch."""
        batch = self._minibatch(step)
        done, random = self._done(step), self._generator(step)
        with torch.enable_grad():
            s = self._shut(self.s)
            if self._enough is None:
                z = self._kept(random) * self._relaxation.sample(s, done, random)
                priced = self._relaxation.price(s, z, done)
            else:
                kept = self._relaxation.sample(s, done, random)
                z, priced = 1 - kept, self._relaxation.price(s, kept, done)
        self.gates.z = z.detach()
        metric = answer_loss if self._enough is None else self._enough.divergence
        with faster_products():
            losses, slope = self.gates.gradient(batch, metric)
            slope = slope / len(batch)
            if self._protect is not None:
                slope = slope + self._protect.slope(self.gates, step)
        self.s.grad = None
        torch.autograd.backward([z, priced], [slope, self._prices])
        self.adam.param_groups[0]["lr"] = self.config.lr * self._decay(step)
        self.adam.step()
        self.mean_s.lerp_(self.s.detach(), 1 - self.config.averaging)
        if self._enough is None and step == math.ceil(_ALL_UNTIL * self.config.steps):
            self._narrow(self._most_open())
        return losses.mean()

    def _most_open(self) -> Bool[Tensor, " component"]:
        """The gates that go on after the first steps."""
        n = max(_FEWEST_CANDIDATES, math.ceil(self.config.candidates * len(self.s)))
        most = self.mean_s.topk(min(n, len(self.s))).indices
        return torch.zeros_like(self._candidates).index_fill(0, most, True)

    def _narrow(self, candidates: Bool[Tensor, " component"]) -> None:
        """Only these gates may be open from now on."""
        self._candidates = candidates.to(self.s.device)
        if not self._candidates.all():
            self.gates.keep(self._candidates)

    def _generator(self, step: int) -> torch.Generator:
        """A function of the step alone, as minibatches are."""
        return torch.Generator().manual_seed(1_000_003 * self.config.seed + step)

    def _kept(self, generator: torch.Generator) -> Float[Tensor, " component"]:
        """Ones, and zeros where a gate is shut for this step."""
        kept = torch.rand(len(self.s), generator=generator) >= self.config.dropout
        return kept.to(self.s)

    def _decay(self, step: int) -> float:
        cosine = (1 + math.cos(math.pi * step / self.config.steps)) / 2
        return _LAST_RATE + (1 - _LAST_RATE) * cosine

    def _minibatch(self, step: int) -> Batch:
        """A function of the step alone, so that a resumed search sees the same examples."""
        size = min(self.config.batch_size, len(self._train))
        per_epoch = len(self._train) // size
        epoch, part = divmod(step - 1, per_epoch)
        rng = np.random.default_rng([self.config.seed, epoch])
        rows = rng.permutation(len(self._train))[part * size : (part + 1) * size]
        batch = make_batches(self._train.select(rows), self.gates.model, size)[0]
        return replace(batch, indices=rows[batch.indices].tolist())

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed training needs."""
        own = {"s": self.s.detach(), "mean_s": self.mean_s, "candidates": self._candidates}
        return {**own, **self.adam.state_dict()["state"][0]}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up the state that :meth:`tensors` gave."""
        with torch.no_grad():
            self.s.copy_(tensors["s"])
            self.mean_s.copy_(tensors["mean_s"])
        self._narrow(tensors["candidates"])
        # load_state_dict puts each part where the optimiser wants it.
        state = {name: tensors[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({"state": {0: state}, "param_groups": groups})


class _Search:
    """Looks at validation, and remembers the best gates."""

    def __init__(
        self,
        model: TransformerBridge,
        run: _Training,
        validation: Dataset,
        config: LearnedConfig,
        protect: Protection | None,
        enough: Sufficiency | None,
    ) -> None:
        self._model = model
        self._run = run
        self._validation = validation
        self._config = config
        self._protect = protect
        self._enough = enough
        self.done = 0
        self.trace: list[dict[str, Any]] = []
        self.best = torch.zeros_like(run.gates.z)
        self._best_found: tuple[float, ...] = (-math.inf,)
        self.looks_since_best = 0

    def look(self, step: int, train_loss: float | None) -> Evaluation:
        """Measure the gates of now on validation."""
        z = self._run.strength(step) if step else torch.zeros_like(self.best)
        if not self._config.attenuate:
            z = (z > 0.5).to(z)
        z = torch.where(z > _OFF, z, 0)
        self._run.gates.set(z)
        found = look(self._model, self._validation, self._config.batch_size)
        n_open = int((z > 0).sum())
        rank = preference(found.accuracy, found.loss, n_open)
        more: dict[str, Any] = {"train_loss": train_loss, "mean_gate": float(z.mean())}
        if self._enough is not None:
            more |= self._enough.look(1 - n_open / len(z))
            rank = (-more["objective"],)
        better, allowed = rank > self._best_found, True
        if self._protect is not None:
            # A pass over protected data takes longer than the look itself.
            harm = self._protect.measure() if better and n_open else {}
            allowed = self._protect.holds(harm)
            more["divergence"] = max(harm.values()) if harm else None if n_open else 0.0
        self.trace.append(trace_row(step, n_open, found, **more))
        self.done = step
        self.looks_since_best += 1
        if better and allowed:
            self.best, self._best_found, self.looks_since_best = z, rank, 0
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What goes into a checkpoint."""
        numbers = {"trace": self.trace, "since": self.looks_since_best, "best": self._best_found}
        return {**self._run.tensors(), "best": self.best}, numbers

    def resume(self, saved: tuple[dict[str, Tensor], dict[str, Any]] | None) -> None:
        """Go on from a checkpoint, or look at the unedited model first."""
        if saved is None:
            self.look(0, None)
            return
        tensors, numbers = saved
        self._run.restore(tensors)
        self.best = tensors["best"].to(self.best)
        self.trace, self.looks_since_best = numbers["trace"], numbers["since"]
        self._best_found = tuple(numbers["best"])
        self.done = self.trace[-1]["step"]
