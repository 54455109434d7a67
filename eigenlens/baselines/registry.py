"""Every baseline with its standard settings, for studies that compare them all."""

from eigenlens.baselines.adapters import Ia3, Lora, Pissa
from eigenlens.baselines.baseline import Baseline
from eigenlens.baselines.bias import LastLayerBias
from eigenlens.baselines.calibration import AveragedCalibration, LearnedCalibration
from eigenlens.baselines.freezing_parts import FreezingPart
from eigenlens.baselines.laser import GradientLaser, Laser
from eigenlens.baselines.prompting import FewShot, ZeroShot
from eigenlens.baselines.random_basis import RandomBasis
from eigenlens.baselines.random_components import RandomComponents
from eigenlens.baselines.ranked import Magnitude, OneShot, OppositeSign, ShuffledLabels
from eigenlens.baselines.svf import Svf


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
    )
