"""What a module of a study holds: how to measure, and how to show what was stored."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import plotly.graph_objects as go

from eigenlens.paper.studies.result import ExperimentResult


@runtime_checkable
class Study(Protocol):
    """A module that measures once and draws as often as one likes.

    ``text``, ``summary`` and ``figure`` take the table alone, fresh or read back from disk.
    """

    @property
    def QUESTION(self) -> str:
        """What the study asks, in one line."""

    @property
    def MINUTES(self) -> int:
        """About how long it takes on two cores."""

    @property
    def run(self) -> Callable[..., ExperimentResult]:
        """Measure, and show what was measured."""

    def text(self, table: pd.DataFrame) -> str:
        """The sentences of the page."""

    def summary(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table of the page."""

    def figure(self, table: pd.DataFrame) -> go.Figure:
        """The figure, as wide as a page or a column (:mod:`eigenlens.plots.style`)."""


def shown(
    study: Study, name: str, table: pd.DataFrame, settings: dict[str, Any]
) -> ExperimentResult:
    """What was measured, fresh or read back from disk, as the study shows it."""
    return ExperimentResult(
        name=name,
        table=table,
        summary=study.summary(table),
        figure=study.figure(table),
        settings=settings,
        text=study.text(table),
    )
