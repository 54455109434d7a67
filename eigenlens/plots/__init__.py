"""Figures from result objects; each function returns a plotly ``Figure``."""

from eigenlens.plots.activations import activation_change, attention_change
from eigenlens.plots.circuit import circuit
from eigenlens.plots.faithfulness import exact_against_estimate, faithfulness
from eigenlens.plots.pruned_map import pruned_map
from eigenlens.plots.search import search_trace
from eigenlens.plots.singular_values import singular_values
from eigenlens.plots.spectra import spectrum

__all__ = [
    "activation_change",
    "attention_change",
    "circuit",
    "exact_against_estimate",
    "faithfulness",
    "pruned_map",
    "search_trace",
    "singular_values",
    "spectrum",
]
