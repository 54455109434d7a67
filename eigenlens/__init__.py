"""eigenlens: find, freeze and explain the singular directions of transformer weights."""

from eigenlens import plots
from eigenlens.activations import ActivationChange, activation_change
from eigenlens.circuits import Circuit, Readout, circuit, composition, cut_paths, readout
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
    "ActivationChange",
    "Circuit",
    "Comparison",
    "EigenpruneConfig",
    "EigenpruneResult",
    "Evaluation",
    "FrozenSet",
    "Protection",
    "Readout",
    "Scores",
    "SearchResult",
    "Spectra",
    "Task",
    "activation_change",
    "circuit",
    "compare",
    "composition",
    "cut_paths",
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
    "readout",
    "score",
    "select",
    "weight_matrices",
]
