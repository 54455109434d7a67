"""Scores of singular components: accumulators, passes, result object."""

from eigenlens.scoring.scorer import score
from eigenlens.scoring.scores import CRITERIA, REFERENCES, Criterion, Reference, Scores

__all__ = ["CRITERIA", "REFERENCES", "Criterion", "Reference", "Scores", "score"]
