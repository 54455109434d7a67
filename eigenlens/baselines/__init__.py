"""Baselines: other ways to change a model's answers, one interface, same data, measured cost."""

from eigenlens.baselines.adapters import Ia3, Lora, Pissa
from eigenlens.baselines.baseline import Baseline, FitResult, Search
from eigenlens.baselines.bias import LastLayerBias
from eigenlens.baselines.calibration import AveragedCalibration, LearnedCalibration
from eigenlens.baselines.compact_adapters import Beft, Psoft, TinyLora, UniLora, Vera
from eigenlens.baselines.edits import Edit, FrozenEdit, NoEdit, load_edit, measure
from eigenlens.baselines.freezing_parts import FreezingPart
from eigenlens.baselines.laser import GradientLaser, Laser
from eigenlens.baselines.learned import Learned
from eigenlens.baselines.prompting import FewShot, ZeroShot
from eigenlens.baselines.random_components import RandomComponents
from eigenlens.baselines.ranked import (
    Magnitude,
    OneShot,
    OppositeSign,
    RandomBasis,
    ShuffledLabels,
)
from eigenlens.baselines.registry import KINDS, make_baseline, standard_baselines
from eigenlens.baselines.svf import Svf

__all__ = [
    "KINDS",
    "AveragedCalibration",
    "Baseline",
    "Beft",
    "Edit",
    "FewShot",
    "FitResult",
    "FreezingPart",
    "FrozenEdit",
    "GradientLaser",
    "Ia3",
    "Laser",
    "LastLayerBias",
    "Learned",
    "LearnedCalibration",
    "Lora",
    "Magnitude",
    "NoEdit",
    "OneShot",
    "OppositeSign",
    "Pissa",
    "Psoft",
    "RandomBasis",
    "RandomComponents",
    "Search",
    "ShuffledLabels",
    "Svf",
    "TinyLora",
    "UniLora",
    "Vera",
    "ZeroShot",
    "load_edit",
    "make_baseline",
    "measure",
    "standard_baselines",
]
