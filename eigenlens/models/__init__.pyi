from .known import KNOWN_MODELS as KNOWN_MODELS
from .known import KnownModel as KnownModel
from .known import UnknownModelError as UnknownModelError
from .loading import load_model as load_model
