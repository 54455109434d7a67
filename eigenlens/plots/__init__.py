"""Figures from result objects; each function returns a plotly ``Figure``."""

from eigenlens.plots.spectra import spectrum

__all__ = ["spectrum"]
