"""The interface of all baselines, and the choice that they share.

A baseline may learn from ``task.train`` and chooses among its hyper-parameters on
``task.validation``: highest exact-match accuracy, then lowest loss. The test split is not looked
at. How many candidates were measured on validation is the length of the trace.
"""

import html
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.baselines.edits import Edit, FrozenEdit, measure, saved_bytes
from eigenlens.costs import Cost, measured, now
from eigenlens.decomposition import decompose
from eigenlens.evaluation import Evaluation, preference
from eigenlens.metrics import check_eval_mode
from eigenlens.provenance import same_weights
from eigenlens.scoring import Scores
from eigenlens.scoring.shards import Shards
from eigenlens.spectra import Spectra
from eigenlens.tasks import Task


@dataclass
class Search:
    """One search for an edit: what it may use, and the best on validation so far.

    Attributes:
        model: in eval mode, unedited.
        spectra: its decomposition, made beforehand: no method pays for it.
        task: the search uses ``train`` and ``validation`` only.
        seed: of everything drawn at random.
        batch_size: examples per pass.
        n_positions: as for :func:`eigenlens.score`, where a method scores.
        shared: scores made so far on these spectra and this train split, by their options.
    """

    model: TransformerBridge
    spectra: Spectra
    task: Task
    seed: int = 0
    batch_size: int = 50
    n_positions: int | None = None
    shared: dict[str, Scores] = field(default_factory=dict)
    best: tuple[Edit, Evaluation] | None = None
    trace: list[dict[str, Any]] = field(default_factory=list)

    def consider(self, edit: Edit, **settings: Any) -> Evaluation:
        """Measure ``edit`` on validation, record it under its settings, and keep the better."""
        found = measure(
            self.model, self.task.validation, edit, batch_size=self.batch_size, choices=False
        )
        self.trace.append({**settings, "accuracy": found.accuracy, "loss": found.loss})
        if self.best is None or rank(edit, found) > rank(*self.best):
            self.best = (edit, found)
        return found

    def in_basis(self, basis: str) -> "Search":
        """The same data with components of the same matrices in another basis, for scoring.

        A random basis is drawn by the seed, and that of ``pca`` is taken on the train split.

        Raises:
            ValueError: an unknown basis, or one that these matrices do not have.
        """
        if basis == self.spectra.basis == "svd":
            return self
        there = {spectrum.site.kind for spectrum in self.spectra.values()}
        layers = {spectrum.site.layer for spectrum in self.spectra.values()}
        made_of = _MADE_OF.get(basis, {kind: {kind} for kind in there})
        spectra = decompose(
            self.model,
            [kind for kind, parts in made_of.items() if parts <= there],
            layers,
            basis=basis,
            data=self.task.train if basis == "pca" else None,
            seed=self.seed,
            progress=False,
        )
        return replace(self, spectra=spectra, shared={})


# Kinds of components that a basis has, and the matrices that each is made of.
_MADE_OF = {
    "qk_ov": {"QK": {"W_Q", "W_K"}, "OV": {"W_V", "W_O"}},
    "neurons": {"W_out": {"W_out"}},
}


def rank(edit: Edit, found: Evaluation) -> tuple[float, ...]:
    """How good an edit is on validation (:func:`eigenlens.evaluation.preference`)."""
    components = len(edit.frozen) if isinstance(edit, FrozenEdit) else 0
    return preference(found.accuracy, found.loss, components)


@dataclass(frozen=True)
class FitResult:
    """What a baseline found.

    Attributes:
        name: of the baseline.
        edit: the best on validation.
        validation: how it did there.
        trace: one row per candidate: its settings, validation ``accuracy`` and ``loss``.
        cost: of the whole search, validation included.
    """

    name: str
    edit: Edit
    validation: Evaluation
    trace: pd.DataFrame
    cost: Cost

    def _repr_html_(self) -> str:
        note = (
            f"{self.name}: {self.validation.accuracy:.1%} on validation, {len(self.trace)} "
            f"candidates, {self.cost.seconds:.1f} s"
        )
        return f"<p>{html.escape(note)}</p>{self.trace.to_html(index=False)}"


class Baseline(ABC):
    """A method that finds an edit."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As it stands in tables."""

    @abstractmethod
    def find(self, search: Search) -> None:
        """Hand every candidate to ``search.consider``."""

    def parts(self, model: TransformerBridge) -> "Sequence[Baseline]":
        """The same candidates, in their order, as searches that do not need one another."""
        return (self,)

    def fit(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        task: Task,
        *,
        seed: int = 0,
        batch_size: int = 50,
        n_positions: int | None = None,
        shared: dict[str, Scores] | None = None,
        shards: Shards | None = None,
    ) -> FitResult:
        """Search for an edit, choose it on validation, and measure what that cost.

        Args:
            model: in eval mode; it is left as it was.
            spectra: its decomposition.
            task: its train and validation splits are used.
            seed: of everything drawn at random.
            batch_size: examples per pass and per training step.
            n_positions: how many of the last prompt positions have a mean of their own, where a
                method scores; all for ``None``.
            shared: given to repetitions that differ in ``seed`` only, lets the second use the
                scores of the first; the cost of those is then that of the first alone.
            shards: a :class:`eigenlens.Cluster`, whose processes try the parts of a grid: learning
                rates and ranks of what is trained, blocks of LASER.

        Raises:
            ValueError: a model in training mode, or what the baseline cannot do with this task.
        """
        check_eval_mode(model)
        if shards is not None and len(parts := self.parts(model)) > 1:
            options = {"seed": seed, "batch_size": batch_size, "n_positions": n_positions}
            fits = [Fit(self.name, part, task, options) for part in parts]
            start = now()
            found = list(shards.run(model, spectra, fits, progress=False))
            return _joined(found, now() - start)
        search = Search(
            model, spectra, task, seed, batch_size, n_positions, {} if shared is None else shared
        )
        with same_weights(model), measured(model) as cost:
            self.find(search)
        if search.best is None:
            raise ValueError(f"{self.name} has nothing to try: its grid is empty.")
        edit, validation = search.best
        cost.parameters_changed = edit.parameters_changed
        cost.saved_bytes = saved_bytes(edit)
        return FitResult(self.name, edit, validation, pd.DataFrame(search.trace), cost)


@dataclass(frozen=True)
class Fit:
    """A search that may be made in another process."""

    name: str
    baseline: Baseline
    task: Task
    options: dict[str, Any]

    def run(self, model: TransformerBridge, spectra: Spectra, *, progress: bool) -> FitResult:
        """Fit the baseline."""
        return self.baseline.fit(model, spectra, self.task, **self.options)


def _joined(parts: Sequence[FitResult], seconds: float) -> FitResult:
    """The result of one search over the candidates of all; the first of equals wins, as in one."""
    best = max(parts, key=lambda part: rank(part.edit, part.validation))
    passes = {
        name: sum(getattr(part.cost, name) for part in parts)
        for name in ("forward_passes", "forward_examples", "backward_passes", "backward_examples")
    }
    memory = max(part.cost.peak_memory_mb for part in parts)
    return replace(
        best,
        trace=pd.concat([part.trace for part in parts], ignore_index=True),
        cost=replace(best.cost, seconds=seconds, peak_memory_mb=memory, **passes),
    )
