"""Freezing the components that one ranking puts first, at the best of several budgets.

Eigenpruning in one shot is the ranking by score; its controls change the ranking, or what freezing
does, and nothing else.
"""

import json
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from eigenlens.baselines.baseline import Baseline, Search
from eigenlens.baselines.edits import FrozenEdit
from eigenlens.frozen_set import FrozenSet
from eigenlens.scoring import Criterion, Reference, Scores, score
from eigenlens.selection import select

FRACTIONS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Ranked(Baseline):
    """Freezes the lowest-ranked components.

    Attributes:
        fractions: budgets to try.
        within: budget over ``all`` components, or the same share of each ``matrix`` or ``layer``.
    """

    fractions: tuple[float, ...] = FRACTIONS
    within: str = "all"

    @abstractmethod
    def ranking(self, search: Search) -> Scores:
        """Scores on the train split; the lowest are frozen first."""

    def find(self, search: Search) -> None:
        """One candidate per budget."""
        for fraction, frozen in self.sets(search).items():
            edit = self.edit(frozen, search)
            search.consider(edit, fraction=fraction, components=len(frozen))

    def sets(self, search: Search) -> dict[float, FrozenSet]:
        """What each budget freezes."""
        scores = self.ranking(search)
        return {f: select(scores, f, within=self.within) for f in self.fractions}

    def edit(self, frozen: FrozenSet, search: Search) -> FrozenEdit:
        """What is done to the chosen components."""
        return FrozenEdit(frozen)


@dataclass(frozen=True)
class OneShot(Ranked):
    """Eigenpruning in one shot: components ranked by their scores.

    Attributes:
        criterion, reference: as for :func:`eigenlens.score`; the reference is also what takes the
            place of a frozen component's activation, but for ``resample``, where its mean does.
    """

    criterion: Criterion = "margin"
    reference: Reference = "mean"

    @property
    def name(self) -> str:
        """With the criterion."""
        return f"eigenpruning, {self.criterion}, one-shot"

    def ranking(self, search: Search) -> Scores:
        """Scores by the criterion."""
        options: dict[str, Any] = {"criterion": self.criterion, "reference": self.reference}
        if self.reference == "resample":
            options["seed"] = search.seed
        return train_scores(search, **options)


@dataclass(frozen=True)
class RandomBasis(OneShot):
    """One-shot eigenpruning on the components of a random orthonormal basis: does the SVD matter?

    There are as many components as singular values, and each is scored and frozen like one.
    """

    @property
    def name(self) -> str:
        """With the criterion."""
        return f"random orthogonal basis, {self.criterion}"

    def ranking(self, search: Search) -> Scores:
        """Scores of the components of a random basis."""
        return super().ranking(search.in_basis("random"))


@dataclass(frozen=True)
class OppositeSign(OneShot):
    """Freezes the components that score best: those that help most."""

    @property
    def name(self) -> str:
        """With the criterion."""
        return f"opposite sign, {self.criterion}"

    def ranking(self, search: Search) -> Scores:
        """Scores with their signs turned."""
        scores = super().ranking(search)
        return ranked_by(scores, -scores.delta_loss)


@dataclass(frozen=True)
class ShuffledLabels(OneShot):
    """Scores against the answers of other examples: what is left is not about the task.

    Validation answers stay true, as do budgets and everything else.
    """

    @property
    def name(self) -> str:
        """With the criterion."""
        return f"shuffled labels, {self.criterion}"

    def ranking(self, search: Search) -> Scores:
        """Scores on permuted answers."""
        task = replace(search.task, train=shuffled_answers(search.task.train, search.seed))
        return super().ranking(replace(search, task=task, shared={}))


@dataclass(frozen=True)
class Magnitude(Ranked):
    """Freezes the components with the smallest or the largest singular values."""

    largest: bool = False

    @property
    def name(self) -> str:
        """Smallest or largest σ."""
        return "largest σ" if self.largest else "smallest σ"

    def ranking(self, search: Search) -> Scores:
        """Singular values in place of scores."""
        scores = train_scores(search)
        sigma = scores.components["sigma"].to_numpy()
        return ranked_by(scores, -sigma if self.largest else sigma)


def shuffled_answers(data: Dataset, seed: int) -> Dataset:
    """The same prompts with each other's answers."""
    order = np.random.default_rng(seed).permutation(len(data))
    answers = list(data["answer"])
    rows = [{**row, "answer": answers[o]} for row, o in zip(data.to_list(), order, strict=True)]
    return Dataset.from_list(rows, features=data.features)


def train_scores(search: Search, **options: Any) -> Scores:
    """Scores on the train split; their means are what freezing needs.

    They do not depend on the seed as long as means replace, so repetitions may share them.
    """
    key = json.dumps(options, sort_keys=True)
    if key not in search.shared:
        search.shared[key] = score(
            search.model,
            search.spectra,
            search.task.train,
            batch_size=search.batch_size,
            n_positions=search.n_positions,
            progress=False,
            **options,
        )
    return search.shared[key]


def ranked_by(scores: Scores, values: np.ndarray) -> Scores:
    """The same components and means with ``values`` in place of scores."""
    return replace(scores, components=scores.components.assign(effect=values), criterion="mean")
