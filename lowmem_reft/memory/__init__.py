"""Memory, measured: the peak of live tensor storages and of the process."""

from lowmem_reft.memory.live import LiveMemory, peak_rss_bytes, track

__all__ = ["LiveMemory", "peak_rss_bytes", "track"]
