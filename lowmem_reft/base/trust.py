"""What a configuration must not ask for: code, or files of others.

No code of a checkpoint is run (``trust_remote_code=False`` everywhere), but a configuration may
also name kernels, which transformers fetches from the hub and runs (since 4.53, where ``kernels``
is installed): as the implementation of the attention, or of the experts of a mixture.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowmem_reft.errors import InputError

_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_EXPERTS = ("experts_implementation", "_experts_implementation", "_experts_implementation_internal")
_FROM_THE_HUB = ("deepgemm", "sonicmoe")
"""Beginnings of the implementations of experts that are kernels of the hub."""


def check_config(model: str | Path, content: dict[str, Any]) -> None:
    """Refuse a configuration, as it stands in ``config.json``, that names code to be fetched.

    Raises:
        InputError: It does, at any depth.
    """
    for name, value in _entries(content):
        for chosen in value.values() if isinstance(value, dict) else [value]:
            if not isinstance(chosen, str):
                continue
            if _is_fetched(chosen, experts=name in _EXPERTS):
                raise InputError(
                    f"model must have a configuration that names no code to fetch, got "
                    f"{str(model)!r} with {name} {chosen!r}; set it to eager or sdpa, or remove it"
                )


@contextmanager
def holding_tensors_alone(name: str, path: str | Path | None) -> Iterator[None]:
    """Say what to do of a file below ``path`` in which torch finds other objects than tensors.

    transformers and PEFT load with ``weights_only``, so these are not made.

    Raises:
        InputError: There is one; ``name`` is the option that led to it.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{name} must lead to files that hold tensors alone, got one in {str(path)!r} with "
            "other objects, which could run code, or one that is damaged; use another"
        ) from error


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield what chooses an implementation, in parts of the configuration too."""
    parts = [content]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            yield from ((name, part[name]) for name in (*_ATTENTION, *_EXPERTS) if name in part)
            parts.extend(part.values())
        elif isinstance(part, list):
            parts.extend(part)


def _is_fetched(name: str, *, experts: bool) -> bool:
    if "/" in name or (experts and name.startswith(_FROM_THE_HUB)):
        return True
    # transformers takes kernels of the hub where the package is missing.
    missing = find_spec("flash_attn") is None and find_spec("flash_attn_interface") is None
    return name.startswith("flash_attention") and missing and find_spec("kernels") is not None
