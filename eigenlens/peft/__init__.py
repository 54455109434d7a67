"""Eigenpruning as a method of peft: importing this module registers it.

After ``import eigenlens.peft``, ``PeftModel.from_pretrained(base, folder)`` loads what
:func:`to_peft` wrote, with ``save_pretrained``, ``set_adapter``, ``disable_adapter`` and
``merge_and_unload`` as for any other adapter. Nothing of TransformerLens takes part in that.
"""

from eigenlens.models.peft_adapters import import_peft

import_peft("eigenlens.peft")  # first, for its message

from eigenlens.peft.config import EigenpruneAdapterConfig  # noqa: E402
from eigenlens.peft.registration import register  # noqa: E402
from eigenlens.peft.writing import get_eigenpruned_model, to_peft  # noqa: E402

__all__ = ["EigenpruneAdapterConfig", "get_eigenpruned_model", "to_peft"]

register()
