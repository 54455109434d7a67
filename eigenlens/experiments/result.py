"""What an experiment returns, and how it is written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from eigenlens.files import save_table, write_text
from eigenlens.provenance import versions


@dataclass(frozen=True)
class ExperimentResult:
    """A table of every measurement, a summary to read, and a figure.

    Attributes:
        name: of the experiment.
        table: one row per measurement.
        summary: what the Markdown page shows.
        figure: drawn from the table.
        settings: what was run, seeds included.
        text: two or three sentences for the page.
    """

    name: str
    table: pd.DataFrame
    summary: pd.DataFrame
    figure: go.Figure
    settings: dict[str, Any]
    text: str

    def save(self, folder: Path) -> None:
        """Write ``NAME.parquet``, ``NAME.md`` and the figure (SVG, or HTML without kaleido)."""
        metadata = {"settings": self.settings, "versions": versions()}
        save_table(folder / f"{self.name}.parquet", "experiment", self.table, metadata)
        picture = self._draw(folder)
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        write_text(
            folder / f"{self.name}.md",
            f"# {self.name}\n\n{self.text}\n\n{self.summary.to_markdown(index=False)}\n\n"
            f"![{self.name}]({picture})\n\n"
            f"`eigenlens experiment {self.name} --out figures` ({settings}); every measurement is "
            f"in `{self.name}.parquet`.\n",
        )

    def _draw(self, folder: Path) -> str:
        try:
            self.figure.write_image(folder / f"{self.name}.svg")
            return f"{self.name}.svg"
        except (ImportError, ValueError, RuntimeError):  # no kaleido, or no browser for it
            self.figure.write_html(folder / f"{self.name}.html")
            return f"{self.name}.html"


def share(accuracy: float, low: float, high: float) -> str:
    """An accuracy with its interval, in percent."""
    return f"{accuracy:.1%} ({low:.1%} … {high:.1%})"
