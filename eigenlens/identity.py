"""What a kept result depends on: the model as it is, where it runs, defaults, and the code.

Whoever finds a result under another identity makes it again.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel
from transformer_lens.model_bridge import TransformerBridge

from eigenlens.provenance import model_fingerprint, text_hash

# Raised by one where the same input gives other numbers than before.
VERSIONS = {
    "evaluate": 1,
    "decompose": 1,
    "score": 1,
    "refine": 1,
    "search": 1,
    "protect": 1,
    "baselines": 1,
    "studies": 1,
}


def conditions(model: TransformerBridge) -> dict[str, Any]:
    """The weights at hand, their type, the kind of device they are on, and the code's versions."""
    weight = next(model.parameters())
    return {
        "model": model_fingerprint(model),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.device(weight.device).type,
        "versions": VERSIONS,
    }


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """Default values of a function's options, those of its configuration object among them."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(parameter.default, str | int | float | bool | tuple | None):
            found[name] = parameter.default
    if inspect.isclass(function) and issubclass(function, BaseModel):
        found = function().model_dump(mode="json")
    return found


def identity_hash(*things: Any) -> str:
    """A short hash of what JSON can hold."""
    return text_hash([json.dumps(things, sort_keys=True)])[:12]
