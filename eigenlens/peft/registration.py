"""Make peft know the method."""

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

from eigenlens.peft.config import METHOD, EigenpruneAdapterConfig
from eigenlens.peft.model import EigenpruneModel


def register() -> None:
    """Register with peft's own function, once."""
    if METHOD in PeftType.__members__:
        return
    _add_member()
    register_peft_method(
        name=METHOD.lower(),
        config_cls=EigenpruneAdapterConfig,
        model_cls=EigenpruneModel,
        prefix=EigenpruneModel.prefix,
    )


def _add_member() -> None:
    """``register_peft_method`` wants an entry in the enumeration of types, which is closed."""
    member = str.__new__(PeftType, METHOD)
    member._name_ = member._value_ = METHOD
    member.__objclass__ = PeftType  # as Enum sets it
    member._sort_order_ = len(PeftType)
    type.__setattr__(PeftType, METHOD, member)
    PeftType._member_names_.append(METHOD)
    PeftType._member_map_[METHOD] = member
    PeftType._value2member_map_[METHOD] = member
