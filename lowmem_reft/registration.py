"""Makes REFT one of PEFT's methods, which PEFT keeps in an enum and refuses outside it."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "REFT"
PREFIX = "reft_"


def reft_type() -> PeftType:
    """Return ``PeftType.REFT``, adding it to PEFT's enum the first time."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_ = member._value_ = NAME
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)


def register(config_cls: type, model_cls: type) -> None:
    """Register the configuration and tuner classes with PEFT, once."""
    if reft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX
        )
