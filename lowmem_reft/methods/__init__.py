"""A name, its configuration, its place on a base, its folder on the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_reft.machine.lazy import names_on_use

if TYPE_CHECKING:
    from lowmem_reft.methods.configs import build_peft_config
    from lowmem_reft.methods.entries import MethodSpec, parse_methods
    from lowmem_reft.methods.table import METHODS, Method, find_method

__all__ = [
    "METHODS",
    "Method",
    "MethodSpec",
    "build_peft_config",
    "find_method",
    "parse_methods",
]
_MODULES = {
    "configs": ["build_peft_config"],
    "entries": ["MethodSpec", "parse_methods"],
    "table": ["METHODS", "Method", "find_method"],
}

__getattr__, __dir__ = names_on_use(__name__, _MODULES)
