"""Classes of TransformerLens by name, without importing it: edits taken home need not have it.

An object can be of such a class only where somebody has imported TransformerLens to make it. So
``isinstance`` looks among the modules that are there, and imports none. Type checkers see the
classes themselves; who makes a bridge imports it from TransformerLens.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components import (
        JointGateUpMLPBridge,
        JointQKVAttentionBridge,
    )
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
else:

    class _Named(type):
        """Instances are those of the class of that name in that module, if it was imported."""

        def __instancecheck__(cls, value):
            module = sys.modules.get(cls.__module__)
            return module is not None and isinstance(value, getattr(module, cls.__name__))

    def _named(module, name):
        return _Named(name, (), {"__module__": f"transformer_lens.{module}"})

    HookPoint = _named("hook_points", "HookPoint")
    TransformerBridge = _named("model_bridge", "TransformerBridge")
    _COMPONENTS = "model_bridge.generalized_components"
    JointGateUpMLPBridge = _named(_COMPONENTS, "JointGateUpMLPBridge")
    JointQKVAttentionBridge = _named(_COMPONENTS, "JointQKVAttentionBridge")
    GeneralizedComponent = _named(f"{_COMPONENTS}.base", "GeneralizedComponent")

__all__ = [
    "GeneralizedComponent",
    "HookPoint",
    "JointGateUpMLPBridge",
    "JointQKVAttentionBridge",
    "TransformerBridge",
]
