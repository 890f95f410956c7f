"""Counts live tensor storages while code runs: what a device would have to hold."""

from __future__ import annotations

import gc
import resource
import sys
import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Iterator


class LiveMemory(TorchDispatchMode):
    """Bytes of live storages on one device type, now and at the peak.

    A storage counts from the operator that returns it until it is freed; views share one storage.
    What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device_type
        self.current_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor`` if it is on the device and not counted yet."""
        if tensor.device.type != self.device_type:
            return
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
            return
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is not None:
            self.current_bytes += size - known[1]  # resized in place
            self._sizes[key] = (known[0], size)
        else:
            reference = weakref.ref(storage, partial(self._free, key))
            self._sizes[key] = (reference, size)
            self.current_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.current_bytes)

    def _free(self, key: int, reference: weakref.ref[Any]) -> None:
        known = self._sizes.get(key)
        if known is not None and known[0] is reference:
            self.current_bytes -= known[1]
            del self._sizes[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it returns."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


@contextmanager
def track(device_type: str = "cpu") -> Iterator[LiveMemory]:
    """Count live storages inside the ``with`` block, those that exist at its start included.

    Yields:
        ``LiveMemory``, whose ``peak_bytes`` and ``current_bytes`` can be read at any time.
    """
    memory = LiveMemory(device_type)
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            memory.add(thing)
    with memory:
        yield memory


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
