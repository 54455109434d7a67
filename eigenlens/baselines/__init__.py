"""Baselines: other ways to change a model's answers, one interface, same data, measured cost."""

from eigenlens.baselines.baseline import Baseline, FitResult, Search
from eigenlens.baselines.edits import Edit, FrozenEdit, NoEdit, load_edit, measure
from eigenlens.baselines.freezing_parts import FreezingPart
from eigenlens.baselines.prompting import FewShot, ZeroShot
from eigenlens.baselines.random_basis import RandomBasis
from eigenlens.baselines.random_components import RandomComponents
from eigenlens.baselines.ranked import Magnitude, OneShot, OppositeSign, ShuffledLabels

__all__ = [
    "Baseline",
    "Edit",
    "FewShot",
    "FitResult",
    "FreezingPart",
    "FrozenEdit",
    "Magnitude",
    "NoEdit",
    "OneShot",
    "OppositeSign",
    "RandomBasis",
    "RandomComponents",
    "Search",
    "ShuffledLabels",
    "ZeroShot",
    "load_edit",
    "measure",
]
