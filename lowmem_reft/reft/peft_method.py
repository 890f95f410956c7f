"""Makes our methods PEFT's own, which PEFT keeps in an enum and refuses outside it.

transformers checks PEFT's version in its own ``add_adapter``; what to do about it is said here.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

from lowmem_reft.errors import InputError

NAME = "REFT"
PREFIX = "reft_"


def peft_type(name: str) -> PeftType:
    """Return PEFT's type of a method of ours (such as REFT), adding it to its enum at first."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType(name)


def type_of(config: Any) -> str:
    """Return the name of PEFT's type of a configuration, in capitals."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def register(name: str, config_cls: type, model_cls: type, *, prefix: str | None = None) -> None:
    """Register a configuration and a tuner class with PEFT, once; the name is in capitals.

    ``prefix`` is that of the names of parameters; PEFT's own one is made of the method's name.
    """
    if peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=name.lower(), config_cls=config_cls, model_cls=model_cls, prefix=prefix
        )


def explain_peft_check() -> None:
    """Let transformers' check of PEFT's version say what to do, where PEFT is too old for it.

    transformers 5.24 asks for a version of PEFT that is not out, without a word on the way round.
    Nothing is replaced where the check passes, is not there, or has been replaced before.
    """
    integration: Any = sys.modules.get("transformers.integrations.peft")  # peft imports it
    check = getattr(integration, "check_peft_version", None)
    needed = getattr(integration, "MIN_PEFT_VERSION", None)
    if check is None or needed is None:
        return
    try:
        check(min_version=needed)
    except InputError:
        pass  # it is the explained one
    except ValueError:
        integration.check_peft_version = _explained(check)


def _explained(check: Any) -> Any:
    @functools.wraps(check)
    def explained(min_version: str) -> None:
        try:
            check(min_version=min_version)
        except ValueError as error:
            transformers = importlib.metadata.version("transformers")
            raise InputError(
                f"peft must be {min_version} or newer for the add_adapter, set_adapter, ... of "
                f"transformers {transformers}, got {importlib.metadata.version('peft')!r}; attach "
                "with peft.get_peft_model(model, config) or PeftModel.from_pretrained(model, "
                f"directory) instead, or install peft>={min_version} if it is out, else "
                f"transformers<{'.'.join(transformers.split('.')[:2])}"
            ) from error

    return explained


def refuse_partial_adapters() -> None:
    """Let transformers' own ``load_adapter`` refuse an adapter of which it has loaded a part.

    It reports what is missing (in 5.24 DoRA's magnitudes and all of LORA_REFT, which PEFT itself
    loads) and goes on with random values. Nothing is replaced where that has been done before.
    """
    integration: Any = sys.modules.get("transformers.integrations.peft")
    mixin = getattr(integration, "PeftAdapterMixin", None)
    load = getattr(mixin, "load_adapter", None)
    if load is not None and getattr(load, "__module__", None) != __name__:
        mixin.load_adapter = _loading_whole(load)  # type: ignore[union-attr]


def _loading_whole(load: Any) -> Any:
    @functools.wraps(load)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        report = load(self, *args, **kwargs)
        wrong = [*getattr(report, "missing_keys", ()), *getattr(report, "mismatched_keys", ())]
        if wrong:
            named = args[0] if args else kwargs.get("peft_model_id")
            raise InputError(
                f"adapter must have all weights that {type(self).__name__}.load_adapter looks for, "
                f"got {named!r} without {len(wrong)} of them, {sorted(map(str, wrong))[0]} for "
                "example, and this model is now half loaded; load the model again and use "
                "PeftModel.from_pretrained(model, directory)"
            )
        return report

    load_adapter.__module__ = __name__
    return load_adapter


def find_best_of_named() -> None:
    """Let transformers' Trainer find the best weights of an adapter that has a name of its own.

    PEFT saves all but ``default`` in a directory of their name. ``load_best_model_at_end`` looks
    beside it, logs that nothing is there, and leaves the last weights in place of the best ones.
    """
    # Here, since it takes a second, which only those who train a named adapter have to wait.
    from transformers import Trainer

    load: Any = Trainer._load_best_model
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_named(self: Any) -> None:
        names = getattr(self.model, "active_adapters", None)
        name = names[0] if isinstance(names, list) and names else "default"
        own = Path(self.state.best_model_checkpoint, name)
        if (own / "adapter_model.safetensors").is_file() and not self.is_fsdp_enabled:
            self.model.load_adapter(str(own), name)
        else:
            load(self)

    Trainer._load_best_model = load_named  # type: ignore[method-assign]
