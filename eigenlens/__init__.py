"""eigenlens: find, freeze and explain the singular directions of transformer weights."""

from eigenlens import plots
from eigenlens.evaluation import (
    Comparison,
    Evaluation,
    compare,
    evaluate,
    majority_accuracy,
    perplexity,
)
from eigenlens.freezing import FrozenSet, freeze
from eigenlens.matrices import weight_matrices
from eigenlens.models import load_model
from eigenlens.pipeline import EigenpruneConfig, EigenpruneResult, eigenprune
from eigenlens.scoring import Scores, score
from eigenlens.search import Protection, SearchResult, guarded, iterative, learned, one_shot
from eigenlens.selection import select
from eigenlens.spectra import Spectra, decompose
from eigenlens.tasks import Task, load_task

__all__ = [
    "Comparison",
    "EigenpruneConfig",
    "EigenpruneResult",
    "Evaluation",
    "FrozenSet",
    "Protection",
    "Scores",
    "SearchResult",
    "Spectra",
    "Task",
    "compare",
    "decompose",
    "eigenprune",
    "evaluate",
    "freeze",
    "guarded",
    "iterative",
    "learned",
    "load_model",
    "load_task",
    "majority_accuracy",
    "one_shot",
    "perplexity",
    "plots",
    "score",
    "select",
    "weight_matrices",
]
