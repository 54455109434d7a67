"""The studies: each returns a table, a summary and a figure. One file each."""

from collections.abc import Callable

from eigenlens.experiments import ambiguous, planted
from eigenlens.experiments.result import ExperimentResult

EXPERIMENTS: dict[str, Callable[..., ExperimentResult]] = {
    "ambiguous": ambiguous.run,
    "planted": planted.run,
}

__all__ = ["EXPERIMENTS", "ExperimentResult"]
