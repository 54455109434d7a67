"""Figures from result objects; each function returns a plotly ``Figure``."""

from eigenlens.plots.faithfulness import exact_against_estimate, faithfulness
from eigenlens.plots.search import search_trace
from eigenlens.plots.spectra import spectrum

__all__ = ["exact_against_estimate", "faithfulness", "search_trace", "spectrum"]
