"""Plain transformers models: what is one, and copies that share its numbers."""

from copy import deepcopy

from torch import nn
from transformers import PreTrainedModel

from eigenlens.bridges import GeneralizedComponent
from eigenlens.models.peft_adapters import has_adapter


def check_plain(model: object) -> None:
    """Raise ``ValueError`` for what is no plain model of transformers, or has an adapter in it."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"The model is a {type(model).__name__} and no plain model of transformers: give what "
            "AutoModelForCausalLM.from_pretrained returns (and use freeze for a bridge)."
        )
    if has_adapter(model) or any(isinstance(m, GeneralizedComponent) for m in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} holds an adapter of peft or belongs to a bridge: give "
            "the plain model."
        )


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own around the same numbers."""
    shared: dict[int, object] = {}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    return deepcopy(model, shared)
