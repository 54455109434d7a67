"""What an experiment returns, and how it is written."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from eigenlens.errors import StaticExportError
from eigenlens.files import save_table, write_text
from eigenlens.plots.export import export
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
        """Write ``NAME.parquet``, ``NAME.md`` and the figure (HTML where SVG cannot be drawn)."""
        metadata = {"settings": self.settings, "versions": versions()}
        save_table(folder / f"{self.name}.parquet", "experiment", self.table, metadata)
        try:
            export({self.name: self.figure}, folder, ("svg", "pdf"))
        except StaticExportError as error:
            warnings.warn(f"{self.name}: the figure is HTML. {error}", stacklevel=2)
            export({self.name: self.figure}, folder, ("html",))
        self.save_page(folder)

    def save_page(self, folder: Path) -> None:
        """Write ``NAME.md``, which shows the figure that lies there."""
        form = "svg" if (folder / f"{self.name}.svg").is_file() else "html"
        settings = ", ".join(f"{key} {_plain(value)}" for key, value in self.settings.items())
        write_text(
            folder / f"{self.name}.md",
            f"# {self.name}\n\n{self.text}\n\n{self.summary.to_markdown(index=False)}\n\n"
            f"![{self.name}]({self.name}.{form})\n\n"
            f"`eigenlens experiment {self.name} --out figures` measures ({settings}), "
            f"`eigenlens figures {self.name}` draws again from `{self.name}.parquet`, which holds "
            "every measurement.\n",
        )


def _plain(value: object) -> str:
    """A setting in words; sequences come back from disk as lists."""
    return " / ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def share(accuracy: float, low: float, high: float) -> str:
    """An accuracy with its interval, in percent."""
    return f"{accuracy:.1%} ({low:.1%} … {high:.1%})"
