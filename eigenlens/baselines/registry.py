"""The baselines by name, for configurations; and each with its standard settings."""

import inspect
from collections.abc import Mapping
from typing import Any

from eigenlens.baselines.adapters import Ia3, Lora, Pissa
from eigenlens.baselines.baseline import Baseline
from eigenlens.baselines.bias import LastLayerBias
from eigenlens.baselines.calibration import AveragedCalibration, LearnedCalibration
from eigenlens.baselines.compact_adapters import Beft, Psoft, TinyLora, UniLora, Vera
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
from eigenlens.baselines.svf import Svf

KINDS: dict[str, type[Baseline]] = {
    "zero_shot": ZeroShot,
    "few_shot": FewShot,
    "one_shot": OneShot,
    "learned": Learned,
    "random_components": RandomComponents,
    "magnitude": Magnitude,
    "random_basis": RandomBasis,
    "freezing_part": FreezingPart,
    "opposite_sign": OppositeSign,
    "shuffled_labels": ShuffledLabels,
    "laser": Laser,
    "gradient_laser": GradientLaser,
    "averaged_calibration": AveragedCalibration,
    "learned_calibration": LearnedCalibration,
    "last_layer_bias": LastLayerBias,
    "svf": Svf,
    "lora": Lora,
    "pissa": Pissa,
    "ia3": Ia3,
    "vera": Vera,
    "tinylora": TinyLora,
    "unilora": UniLora,
    "psoft": Psoft,
    "beft": Beft,
}


def make_baseline(kind: str, arguments: Mapping[str, Any]) -> Baseline:
    """A baseline from a configuration; lists become tuples.

    Raises:
        ValueError: no such kind, or an argument that it does not take or allow.
        ImportError: the baseline needs a package that is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown method {kind!r}; choose from {', '.join(KINDS)}.")
    known = [name for name in inspect.signature(KINDS[kind]).parameters if name != "name"]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(f"{kind} does not take {', '.join(unknown)}; it takes {', '.join(known)}.")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return KINDS[kind](**values)


def standard_baselines() -> tuple[Baseline, ...]:
    """One of each kind, one-shot eigenpruning among them.

    Raises:
        ImportError: peft is not installed.
    """
    return (
        ZeroShot(),
        FewShot(),
        OneShot(),
        RandomComponents("count"),
        RandomComponents("energy"),
        Magnitude(),
        Magnitude(largest=True),
        RandomBasis(),
        FreezingPart(part="bias only"),
        FreezingPart(part="zero"),
        FreezingPart(part="position-free"),
        OppositeSign(),
        ShuffledLabels(),
        Laser(),
        GradientLaser(),
        AveragedCalibration(),
        LearnedCalibration(),
        LastLayerBias(),
        Svf(),
        Lora(),
        Pissa(),
        Ia3(),
        Vera(),
        TinyLora(),
        UniLora(),
        Psoft(),
        Beft(),
    )
