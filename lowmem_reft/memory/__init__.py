"""Memory: predicted before a byte is loaded, measured while it runs.

``plan`` predicts (``planner``: verdicts and searches; ``predict``: the step on the meta device;
``kernels``: what that device does not show; ``outputs``: what repeats there; ``reuse``: what can be
stored; ``shapes`` and ``gpus``: models and cards by name).
``track`` and ``MemoryCallback`` count what is alive while your own code runs (``live``);
``measure`` asks the allocator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_reft.memory.callback import MemoryCallback
    from lowmem_reft.memory.live import LiveMemory, peak_rss_bytes, track
    from lowmem_reft.memory.planner import Lengths, Plan, plan

__all__ = ["Lengths", "LiveMemory", "MemoryCallback", "Plan", "peak_rss_bytes", "plan", "track"]

_HOMES = {
    "Lengths": "planner",
    "LiveMemory": "live",
    "MemoryCallback": "callback",
    "Plan": "planner",
    "peak_rss_bytes": "live",
    "plan": "planner",
    "track": "live",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
