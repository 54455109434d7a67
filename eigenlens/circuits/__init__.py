"""Circuits: what components read and write, and the paths between kept and pruned ones."""

from eigenlens.circuits.composition import composition
from eigenlens.circuits.examples import Examples, examples
from eigenlens.circuits.graph import Circuit
from eigenlens.circuits.groups import Groups, groups
from eigenlens.circuits.intervention import cut_paths
from eigenlens.circuits.readout import Readout, readout
from eigenlens.circuits.trace import circuit

__all__ = [
    "Circuit",
    "Examples",
    "Groups",
    "Readout",
    "circuit",
    "composition",
    "cut_paths",
    "examples",
    "groups",
    "readout",
]
