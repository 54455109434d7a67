"""The studies: each returns a table, a summary and a figure. One file each."""

from eigenlens.experiments import ambiguous, estimators, planted, searches
from eigenlens.experiments.result import ExperimentResult
from eigenlens.experiments.study import Study

EXPERIMENTS: dict[str, Study] = {
    "ambiguous": ambiguous,
    "estimators": estimators,
    "planted": planted,
    "searches": searches,
}

__all__ = ["EXPERIMENTS", "ExperimentResult", "Study"]
