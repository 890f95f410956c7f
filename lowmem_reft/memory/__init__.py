"""Memory: predicted before a byte is loaded, measured while it runs.

``plan`` predicts (``planner``: verdicts; ``search``: what would fit; ``predict``: the step on the
meta device; ``kernels``: what that device does not show; ``outputs``: what repeats there;
``reuse``: what can be stored; ``shapes`` and ``cards``: models and cards by name).
``track`` and ``MemoryCallback`` count what is alive while your own code runs (``live``);
``measure`` asks the allocator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_reft.machine.lazy import names_on_use

if TYPE_CHECKING:
    from lowmem_reft.memory.callback import MemoryCallback
    from lowmem_reft.memory.live import LiveMemory, peak_rss_bytes, track
    from lowmem_reft.memory.planner import Plan, plan
    from lowmem_reft.memory.predict import Lengths

__all__ = ["Lengths", "LiveMemory", "MemoryCallback", "Plan", "peak_rss_bytes", "plan", "track"]

__getattr__, __dir__ = names_on_use(
    __name__,
    {
        "callback": ["MemoryCallback"],
        "live": ["LiveMemory", "peak_rss_bytes", "track"],
        "planner": ["Plan", "plan"],
        "predict": ["Lengths"],
    },
)
