"""What a function asks memory for, marked at the function: counting memory reads it off the frames.

A mark names code, not a file, so that it moves along, and costs nothing where nobody counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

CATEGORY_OF: dict[CodeType, str] = {}
"""What the storages belong to that are made in a function's own lines."""

STEPS: set[CodeType] = set()
"""Functions that begin a step: whoever calls them is no part of the model."""


def allocates(category: str) -> Callable[[_Function], _Function]:
    """Say what the storages belong to that a function's own lines make.

    Args:
        category: One of ``memory.live.CATEGORIES``.
    """

    def mark(function: _Function) -> _Function:
        CATEGORY_OF[_code_of(function)] = category
        return function

    return mark


def begins_step(function: _Function) -> _Function:
    """Say that a function begins a step of training, scoring or generation."""
    STEPS.add(_code_of(function))
    return function


def _code_of(function: Any) -> CodeType:
    code: CodeType = inspect.unwrap(function).__code__
    return code
