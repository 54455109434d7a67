"""A bridge around a plain model, where only TransformerLens can tell whether an edit fits it."""

import torch
from transformer_lens.factories.architecture_adapter_factory import (
    SUPPORTED_ARCHITECTURES,
    ArchitectureAdapterFactory,
)
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers import PreTrainedModel

from eigenlens.export.plain import sharing_copy
from eigenlens.models.wrapping import check_architecture


def bridge_around(model: PreTrainedModel) -> TransformerBridge:
    """A bridge of the same weights, which are not copied, that leaves the plain model alone.

    Only matrices that TransformerLens splits are copied. It has no tokenizer.

    Raises:
        UnsupportedModelError: TransformerLens has no bridge for it.
    """
    copy = sharing_copy(model)
    known = (c.__name__ for c in type(model).__mro__ if c.__name__ in SUPPORTED_ARCHITECTURES)
    copy.config.architectures = [name := next(known, type(model).__name__)]
    check_architecture(copy.config)
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]):  # TransformerLens draws weights, and drops them
        config = build_bridge_config_from_hf(copy.config, name, name, weight.dtype)
        config.device = str(weight.device)
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(config)
        adapter.prepare_model(copy)
        return TransformerBridge(copy, adapter, None)
