"""The studies: each returns a table, a summary and a figure. One file each."""

from collections.abc import Callable

from eigenlens.experiments import ambiguous, estimators, planted, searches
from eigenlens.experiments.result import ExperimentResult

EXPERIMENTS: dict[str, Callable[..., ExperimentResult]] = {
    "ambiguous": ambiguous.run,
    "estimators": estimators.run,
    "planted": planted.run,
    "searches": searches.run,
}

__all__ = ["EXPERIMENTS", "ExperimentResult"]
