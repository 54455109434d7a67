"""Figures that only studies draw."""

from eigenlens.paper.plots.comparison import methods
from eigenlens.paper.plots.transfer_grid import transfer

__all__ = ["methods", "transfer"]
