"""Makes our methods PEFT's own, which PEFT keeps in an enum and refuses outside it."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "REFT"
PREFIX = "reft_"


def peft_type(name: str) -> PeftType:
    """Return PEFT's type of a method of ours, adding it to PEFT's enum the first time.

    Args:
        name: in capitals, for example REFT.
    """
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


def register(name: str, config_cls: type, model_cls: type, *, prefix: str | None = None) -> None:
    """Register a configuration and a tuner class with PEFT, once.

    Args:
        name: of the method, in capitals.
        config_cls: its configuration.
        model_cls: its tuner.
        prefix: of the names of its parameters; default: PEFT's, from the name.
    """
    if peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix
        )
