"""Short names of methods, for charts, sentences and menus; the tables give the full ones."""

from __future__ import annotations

import re
from collections.abc import Iterable

_REFERENCE = "qlora"


def head(method: str) -> str:
    """The method's name without its settings: ``"qlora"`` of ``"qlora[rank=8]"``."""
    return method.partition("[")[0]


def find_reference(methods: Iterable[str]) -> str | None:
    """What the others are compared with: the first qlora, or the first of all that were tuned."""
    tuned = list(methods)
    return next((method for method in tuned if head(method) == _REFERENCE), next(iter(tuned), None))


def short_names(methods: Iterable[str]) -> dict[str, str]:
    """Each method without the settings that all methods of its name share.

    ``lora[rank=8]`` alone is ``lora``; beside ``lora[rank=8,storage=bf16]`` the latter is
    ``lora[storage=bf16]``. Names that would be the same stay as they are.
    """
    methods = list(dict.fromkeys(methods))
    shared = {
        name: set.intersection(*(set(_settings(m)) for m in methods if head(m) == name))
        for name in map(head, methods)
    }
    short = {}
    for method in methods:
        own = [part for part in _settings(method) if part not in shared[head(method)]]
        short[method] = head(method) + (f"[{','.join(own)}]" if own else "")
    if len(set(short.values())) < len(short):
        return {method: method for method in methods}
    return short


def _settings(method: str) -> list[str]:
    match = re.fullmatch(r"[^\[]*\[(.*)\]", method)
    return match[1].split(",") if match else []
