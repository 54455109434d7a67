"""Figures from result objects; each function returns a plotly ``Figure``."""

from eigenlens.plots.activations import activation_change
from eigenlens.plots.attention import attention_change, attention_heads
from eigenlens.plots.cuts import path_cuts
from eigenlens.plots.examples import example_losses
from eigenlens.plots.faithfulness import exact_against_estimate, faithfulness
from eigenlens.plots.frontiers import frontier
from eigenlens.plots.graphs import circuit
from eigenlens.plots.maps import pruned_map
from eigenlens.plots.search import search_trace
from eigenlens.plots.sigma import singular_values
from eigenlens.plots.spectra import spectrum

__all__ = [
    "activation_change",
    "attention_change",
    "attention_heads",
    "circuit",
    "exact_against_estimate",
    "example_losses",
    "faithfulness",
    "frontier",
    "path_cuts",
    "pruned_map",
    "search_trace",
    "singular_values",
    "spectrum",
]
