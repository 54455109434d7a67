"""Parts of the examples of a scoring run, and where they are worked on.

A :class:`Job` is one pass over a part of the examples. What it returns are sums, which
:func:`eigenlens.scoring.accumulators.merged` adds up.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


@runtime_checkable
class Shards(Protocol):
    """Where the parts of the examples are worked on."""

    @property
    def count(self) -> int:
        """How many parts to make, at most."""

    def sums(
        self, model: TransformerBridge, spectra: Spectra, jobs: Sequence[Job], *, progress: bool
    ) -> Iterator[Collected]:
        """What each job found, in their order."""


@dataclass(frozen=True)
class InTurn:
    """One part after the other in this process."""

    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"shards={self.count}: at least 1 is needed.")

    def sums(
        self, model: TransformerBridge, spectra: Spectra, jobs: Sequence[Job], *, progress: bool
    ) -> Iterator[Collected]:
        """What each job found, in their order."""
        for job in jobs:
            yield job.run(model, spectra, progress=progress)
