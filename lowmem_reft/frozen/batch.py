"""Stacks the constants of a batch, also ahead of time in a thread while the last batch trains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem_reft.frozen.layout import Layout, Shape
from lowmem_reft.frozen.store import CorruptShardError, Record

MOST_AHEAD = 8
"""Batches that may wait; those that nobody asked for make room for newer ones."""


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """A batch on the CPU, in pinned memory if it will travel to a CUDA device."""

    shapes: Sequence[Shape]
    """Of the examples."""
    hidden: Tensor
    """(batch, suffix, hidden): the trunk's output, padded on the right."""
    keys: Tensor
    """(layers, batch, heads, prefix, head_dim): of the prefixes, padded on the left."""
    values: Tensor
    """The same shape."""

    @property
    def suffix(self) -> int:
        """Tokens of the longest example after its prefix."""
        return self.hidden.shape[1]

    @property
    def prefix(self) -> int:
        """Tokens of the longest prefix."""
        return self.keys.shape[3]


def stack(records: Sequence[Record], layout: Layout, *, pinned: bool) -> Stacked:
    """Stack constants of examples.

    Args:
        records: Of each example.
        layout: What the store holds.
        pinned: Whether to use memory from which a CUDA device can copy by itself.
    """
    shapes = [Shape(record.keys.shape[2], record.hidden.shape[0]) for record in records]
    suffix, prefix = (max(shape.suffix for shape in shapes), max(s.prefix for s in shapes))
    batch, dtype = len(records), records[0].hidden.dtype
    hidden = torch.zeros(batch, suffix, layout.hidden_size, dtype=dtype, pin_memory=pinned)
    size = (layout.num_cached_layers, batch, layout.num_kv_heads, prefix, layout.head_dim)
    keys = torch.zeros(size, dtype=dtype, pin_memory=pinned)
    values = torch.zeros(size, dtype=dtype, pin_memory=pinned)
    for row, (shape, record) in enumerate(zip(shapes, records, strict=True)):
        hidden[row, : shape.suffix] = record.hidden
        if shape.prefix:
            keys[:, row, :, prefix - shape.prefix :] = record.keys
            values[:, row, :, prefix - shape.prefix :] = record.values
    return Stacked(shapes=shapes, hidden=hidden, keys=keys, values=values)


class ReadAhead:
    """Reads and stacks batches in a thread before they are needed.

    Args:
        make: Reads and stacks the examples of some indices; runs no model.
    """

    def __init__(self, make: Callable[[Sequence[int]], Stacked]) -> None:
        self.make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lowmem-reft-read-ahead")
        self._waiting: OrderedDict[tuple[int, ...], Future[Stacked]] = OrderedDict()

    def announce(self, indices: Sequence[int]) -> None:
        """Begin to read a batch."""
        key = tuple(indices)
        if key not in self._waiting:
            self._waiting[key] = self._thread.submit(self.make, key)
        while len(self._waiting) > MOST_AHEAD:
            self._waiting.popitem(last=False)[1].cancel()

    def take(self, indices: Sequence[int]) -> Stacked | None:
        """Return a batch that was announced; None if it was not, or if a shard is damaged."""
        future = self._waiting.pop(tuple(indices), None)
        if future is None:
            return None
        try:
            return future.result()
        except CorruptShardError:
            return None
