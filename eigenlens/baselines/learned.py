"""Eigenpruning by trained gates, in the same harness as what it is compared with."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from eigenlens.baselines.baseline import Baseline, Search
from eigenlens.baselines.edits import FrozenEdit
from eigenlens.baselines.ranked import train_scores
from eigenlens.decomposition import Basis
from eigenlens.scoring import Criterion, Reference
from eigenlens.search import LearnedConfig, Protection, learned


@dataclass(frozen=True)
class Learned(Baseline):
    """Components chosen by :func:`eigenlens.learned`: the default search of ``eigenlens run``.

    Attributes:
        attenuate: leave gates as they are trained instead of opening or shutting them.
        basis: what components gates are put on (:mod:`eigenlens.bases`).
        criterion: of the scores, which matter only with the option ``spread``.
        reference: the means that take a coordinate's place.
        price: of a gate, in nats of loss per nat that freezing is predicted to cost the model's own
            text (:class:`eigenlens.Protection`); 0 protects nothing.
        bound: most nats per token that the model's own text may diverge; ``None`` for any.
        move_means: with a price, freeze at the constants that this text minds least.
        options: further options, of :class:`eigenlens.LearnedConfig`.
    """

    attenuate: bool = False
    basis: Basis | str = "svd"
    criterion: Criterion = "mean"
    reference: Reference = "mean"
    price: float = 0.0
    bound: float | None = None
    move_means: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.basis not in get_args(Basis):
            raise ValueError(f"basis={self.basis!r}: choose from {', '.join(get_args(Basis))}.")

    @property
    def name(self) -> str:
        """With what becomes of the gates."""
        basis = "" if self.basis == "svd" else f", {self.basis} basis"
        return f"eigenpruning, learned, {'attenuated' if self.attenuate else 'frozen'}{basis}"

    def find(self, search: Search) -> None:
        """One candidate: the search looks at validation itself."""
        options = LearnedConfig(
            attenuate=self.attenuate,
            batch_size=search.batch_size,
            seed=search.seed,
            **self.options,
        )
        found = learned(
            search.model,
            train_scores(
                search.in_basis(self.basis), criterion=self.criterion, reference=self.reference
            ),
            search.task.train,
            search.task.validation,
            options,
            protect=self._protection(search),
            progress=False,
        )
        edit = FrozenEdit(found.frozen)
        search.consider(edit, components=len(found.frozen), looks=len(found.trace))

    def _protection(self, search: Search) -> Protection | None:
        if not self.price and self.bound is None:
            return None
        return Protection.of_own_text(
            search.model,
            price=self.price,
            move_means=self.move_means,
            weight=0.0,
            bound=math.inf if self.bound is None else self.bound,
        )
