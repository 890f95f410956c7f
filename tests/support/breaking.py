"""The marker of a probe, and ways to break a library for the length of a test."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import pytest

Break = Callable[[pytest.MonkeyPatch], object]


def contract(library: str, *, used_by: str, broken_by: Break) -> pytest.MarkDecorator:
    """Mark a test as a probe.

    Args:
        library: What is probed, by the name of its distribution.
        used_by: Files of the package that lean on it, with blanks between them.
        broken_by: Breaks it, so that the probe has to fail.
    """
    return pytest.mark.contract(library=library, used_by=used_by.split(), broken_by=broken_by)


def without(path: str) -> Break:
    """Take away what ``module:Class.name`` names."""
    return lambda patch: patch.delattr(*_owner(path))


def with_value(path: str, value: Any) -> Break:
    """Set what ``module:Class.name`` names to something else."""
    return lambda patch: patch.setattr(*_owner(path), value)


def with_result(path: str, change: Callable[[Any], Any]) -> Break:
    """Change what a function returns."""

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def changed(*args: Any, **kwargs: Any) -> Any:
            return change(function(*args, **kwargs))

        return changed

    return wrapped(path, wrap)


def wrapped(path: str, wrap: Callable[[Any], Any]) -> Break:
    """Replace a function, or a method as its class has it, by one that is made of it."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        owner, name = _owner(path)
        static = inspect.getattr_static(owner, name)
        if isinstance(static, classmethod | staticmethod):
            patch.setattr(owner, name, type(static)(wrap(static.__func__)))
        elif isinstance(static, property):
            patch.setattr(owner, name, property(wrap(static.fget)))
        else:
            patch.setattr(owner, name, wrap(static))

    return apply


def doing_nothing(path: str) -> Break:
    """Make a function do nothing and return None."""
    return wrapped(path, lambda _: lambda *args, **kwargs: None)


def _owner(path: str) -> tuple[Any, str]:
    owner, _, name = path.replace(":", ".:", 1).rpartition(".")
    if owner.endswith(":") or name.startswith(":"):
        module, _, name = path.partition(":")
        return resolve_name(module), name
    return resolve_name(owner.replace(".:", ":")), name
