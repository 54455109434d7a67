"""Figures from result objects; each function returns a plotly ``Figure``."""

from eigenlens.plots.activations import activation_change, attention_change
from eigenlens.plots.circuit import circuit
from eigenlens.plots.pruned_map import pruned_map
from eigenlens.plots.singular_values import singular_values
from eigenlens.plots.spectra import spectrum

__all__ = [
    "activation_change",
    "attention_change",
    "circuit",
    "pruned_map",
    "singular_values",
    "spectrum",
]
