"""Searching for what to freeze: one ranking, or rankings under what is frozen already, or gates.

Joint effects are not sums, and a score is a derivative. ``one_shot`` freezes by one ranking,
``iterative`` scores again after every few components, ``guarded`` accepts a step only if the loss
on held-out examples falls, and ``learned`` trains a gate per component. Each chooses its budget or
stopping point on validation data, and returns a :class:`SearchResult` with a trace of every step.
"""

from collections.abc import Callable

from eigenlens.search.checked_steps import GuardedConfig, guarded
from eigenlens.search.gate_training import LearnedConfig, learned
from eigenlens.search.protection import Protection
from eigenlens.search.rescored_steps import iterative
from eigenlens.search.result import SearchResult
from eigenlens.search.single_ranking import one_shot

SEARCHES: dict[str, Callable[..., SearchResult]] = {
    "one_shot": one_shot,
    "iterative": iterative,
    "guarded": guarded,
    "learned": learned,
}

__all__ = [
    "SEARCHES",
    "GuardedConfig",
    "LearnedConfig",
    "Protection",
    "SearchResult",
    "guarded",
    "iterative",
    "learned",
    "one_shot",
]
