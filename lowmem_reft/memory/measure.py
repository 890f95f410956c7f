"""The peak of running code as the allocator saw it, independent of any count of ours."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_reft.machine.notices import written_hidden


@dataclass(frozen=True)
class Measured:
    """What an allocator saw while code ran."""

    allocated_bytes: int
    """On CUDA the most that was allocated, what was there before included; on a CPU the most
    that was added to what was there before."""
    reserved_bytes: int | None
    """CUDA: the most that the caching allocator held; None on a CPU."""


def measure(device: torch.device, run: Callable[[], Any]) -> Measured:
    """Run code and return its peak.

    On a CPU the peak comes from the allocator's own events, recorded by ``torch.profiler``; on CUDA
    from ``torch.cuda.max_memory_allocated``.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return Measured(
            torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        )
    gc_was_on = gc.isenabled()
    gc.disable()  # what it frees at a random moment would blur the peak
    try:
        recording = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            profile_memory=True,
            acc_events=True,  # torch 2.11 warns without it
        )
        with written_hidden(), recording as profiler:
            run()
    finally:
        if gc_was_on:
            gc.enable()
    inner: Any = profiler.profiler
    events = [
        (event.start_ns(), event.nbytes())
        for event in inner.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU
    ]
    events.sort(key=lambda event: event[0])
    levels = itertools.accumulate(change for _, change in events)
    return Measured(max(0, max(levels, default=0)), None)
