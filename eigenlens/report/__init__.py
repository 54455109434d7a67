"""One self-contained HTML page for a run folder."""

from eigenlens.report.page import write_report

__all__ = ["write_report"]
