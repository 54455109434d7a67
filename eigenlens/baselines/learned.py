"""Eigenpruning by trained gates, in the same harness as what it is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from eigenlens.baselines.baseline import Baseline, Search
from eigenlens.baselines.edits import FrozenEdit
from eigenlens.baselines.random_basis import random_spectra
from eigenlens.baselines.ranked import train_scores
from eigenlens.scoring import Criterion
from eigenlens.search import learned

Basis = Literal["singular", "random"]


@dataclass(frozen=True)
class Learned(Baseline):
    """Components chosen by :func:`eigenlens.learned`: the default search of ``eigenlens run``.

    Attributes:
        attenuate: leave gates as they are trained instead of opening or shutting them.
        basis: directions that gates are put on: the ``singular`` ones, or those of a ``random``
            orthogonal basis (:mod:`eigenlens.baselines.random_basis`).
        criterion: of the scores, which matter only with the option ``spread``.
        options: further arguments of :func:`eigenlens.learned`.
    """

    attenuate: bool = False
    basis: Basis = "singular"
    criterion: Criterion = "mean"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.basis not in get_args(Basis):
            raise ValueError(f"basis={self.basis!r}: choose from {', '.join(get_args(Basis))}.")

    @property
    def name(self) -> str:
        """With what becomes of the gates."""
        basis = ", random basis" if self.basis == "random" else ""
        return f"eigenpruning, learned, {'attenuated' if self.attenuate else 'frozen'}{basis}"

    def find(self, search: Search) -> None:
        """One candidate: the search looks at validation itself."""
        if self.basis == "random":
            search.spectra, search.shared = random_spectra(search.spectra, search.seed), {}
        found = learned(
            search.model,
            train_scores(search, criterion=self.criterion),
            search.task.train,
            search.task.validation,
            attenuate=self.attenuate,
            batch_size=search.batch_size,
            seed=search.seed,
            progress=False,
            **self.options,
        )
        control = {"basis_seed": search.seed} if self.basis == "random" else {}
        edit = FrozenEdit(found.frozen, control=control)
        search.consider(edit, components=len(found.frozen), looks=len(found.trace))
