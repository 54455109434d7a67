"""Scores of components: accumulators, passes, result object."""

from eigenlens.scoring.scorer import score
from eigenlens.scoring.scores import CRITERIA, REFERENCES, Criterion, Reference, Scores
from eigenlens.scoring.single_effects import SingleEffects, single_effects

__all__ = [
    "CRITERIA",
    "REFERENCES",
    "Criterion",
    "Reference",
    "Scores",
    "SingleEffects",
    "score",
    "single_effects",
]
