"""Parts of the examples of a scoring run, and where parts of any work on a model are done.

A :class:`Job` is one pass over a part of the examples. What it returns are sums, which
:func:`eigenlens.scoring.accumulators.merged` adds up.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

from eigenlens.bridges import TransformerBridge
from eigenlens.metrics import Metric
from eigenlens.passes import FiniteCheck
from eigenlens.scoring.accumulators import Collected
from eigenlens.scoring.plan import Plan
from eigenlens.scoring.references import References
from eigenlens.scoring.running import Passes
from eigenlens.spectra import Spectra

# Sums of one pass over the examples that the references are of. A function of a module, or a
# partial of one, so that it can be sent to another process.
Work = Callable[[Passes, References], Collected]


@dataclass(frozen=True)
class Job:
    """One pass over a part of the examples.

    Attributes:
        name: for progress bars.
        plan: the examples.
        metric: a number per example.
        work: what to sum.
    """

    name: str
    plan: Plan
    metric: Metric
    work: Work

    def run(self, model: TransformerBridge, spectra: Spectra, *, progress: bool) -> Collected:
        """The sums over these examples.

        Raises:
            ValueError: NaN or infinite activations.
        """
        finite = FiniteCheck()
        passes = Passes(model, spectra, self.metric, finite, progress)
        found = self.work(passes, References(model, spectra, self.plan, finite))
        finite.check()
        return found


T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


@runtime_checkable
class Part(Protocol[T_co]):
    """Work on a model, such as a :class:`Job`, that can be sent to another process."""

    @property
    def name(self) -> str:
        """For progress bars."""

    def run(self, model: TransformerBridge, spectra: Spectra, *, progress: bool) -> T_co:
        """Do it."""


@runtime_checkable
class Shards(Protocol):
    """Where parts are worked on."""

    @property
    def count(self) -> int:
        """How many parts to make, at most."""

    def run(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        parts: Sequence[Part[T]],
        *,
        progress: bool,
    ) -> Iterator[T]:
        """What each part found, in their order."""


@dataclass(frozen=True)
class InTurn:
    """One part after the other in this process."""

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"shards={self.count}: at least 1 is needed.")

    def run(
        self,
        model: TransformerBridge,
        spectra: Spectra,
        parts: Sequence[Part[T]],
        *,
        progress: bool,
    ) -> Iterator[T]:
        """What each part found, in their order."""
        for part in parts:
            yield part.run(model, spectra, progress=progress)
