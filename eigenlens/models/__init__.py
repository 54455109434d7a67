"""Loading models: what is whole, causal and computed rightly comes back, the rest is refused."""

from eigenlens.models.known import KNOWN_MODELS, KnownModel, UnknownModelError
from eigenlens.models.loading import load_model

__all__ = ["KNOWN_MODELS", "KnownModel", "UnknownModelError", "load_model"]
