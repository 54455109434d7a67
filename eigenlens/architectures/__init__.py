"""What can be decomposed of every decoder architecture of TransformerLens, tried on random weights.

:mod:`~eigenlens.architectures.tiny_models` makes a tiny model of each,
:mod:`~eigenlens.architectures.oracles` tries it, and :mod:`~eigenlens.architectures.table` tells
what came of it.
"""

from .table import Row as Row
from .table import decoders as decoders
from .table import rows as rows
from .table import to_json as to_json
from .table import to_markdown as to_markdown
