"""Memory: predicted before a byte is loaded, measured while it runs."""

from lowmem_reft.memory.live import LiveMemory, peak_rss_bytes, track

__all__ = ["LiveMemory", "peak_rss_bytes", "track"]
