"""A batch of constants: stacked, also ahead of time in a thread, and run through upper blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.caches import with_cache
from lowmem_reft.base.partial import feeding
from lowmem_reft.reuse.layout import Layout, Shape
from lowmem_reft.reuse.store import CorruptShardError, Record

MOST_AHEAD = 8
"""Batches that may wait; further ones are read when they are needed."""


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


def aligned(shapes: Sequence[Shape], values: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return one number per token, (batch, suffix): without prefixes, padded on the right.

    Args:
        shapes: Of the examples.
        values: One number for each token of each example, or more.
        fill: What padding gets.
    """
    rows = torch.full((len(shapes), max(shape.suffix for shape in shapes)), fill)
    for row, shape, numbers in zip(rows, shapes, values, strict=True):
        row[: shape.suffix] = torch.tensor(numbers[shape.prefix : shape.length])
    return rows


def run_stacked(
    model: Any,
    num_blocks: int,
    stacked: Stacked,
    *,
    groups: Tensor | None = None,
    input_ids: Tensor | None = None,
    wrapped: Any = None,
    **arguments: Any,
) -> Any:
    """Return what a model returns for a batch, from its constants.

    Args:
        model: A PeftModel.
        num_blocks: Blocks that the hidden vectors have passed.
        stacked: The batch.
        groups: (batch, suffix): the index of the φ that edits each token, or -1; with prefixes,
            where the model cannot tell the prompt from what it sees.
        input_ids: (batch, suffix): for models that look at them, such as classifiers.
        wrapped: What is called in the model's place: a wrapper around it.
        arguments: Further ones of the model's forward, such as ``labels``.
    """
    device = device_of(base_of(model))
    # A prediction on the meta device needs the values of the masks as well.
    there = torch.device("cpu") if device.type == "meta" else device
    batch, suffix, prefix = len(stacked.shapes), stacked.suffix, stacked.prefix
    mask = torch.zeros(batch, prefix + suffix, dtype=torch.long)
    positions = torch.zeros(batch, suffix, dtype=torch.long)
    for row, shape in enumerate(stacked.shapes):
        mask[row, prefix - shape.prefix : prefix + shape.suffix] = 1
        # Padding repeats the last position: a table of positions may end there.
        numbers = torch.arange(shape.prefix, shape.prefix + suffix)
        positions[row] = numbers.clamp(max=shape.length - 1)
    hidden = stacked.hidden.to(device, non_blocking=True)
    arguments["attention_mask"] = mask.to(there)
    arguments["use_cache"] = bool(prefix)
    if input_ids is None:
        arguments["inputs_embeds"] = hidden  # what the blocks below would get plays no part
    else:
        arguments["input_ids"] = input_ids.to(there)
    if prefix:
        assert groups is not None
        arguments["intervention_mask"] = groups.to(there)
        arguments["position_ids"] = positions.to(there)
        base = base_of(model)
        arguments |= with_cache(base, _cache(base.config, num_blocks, stacked, device))
    with feeding(model, num_blocks, hidden):
        return (wrapped or model)(**arguments)


def _cache(config: Any, num_blocks: int, stacked: Stacked, device: torch.device) -> DynamicCache:
    """Return a cache with the keys and values of the prefixes."""
    cache = DynamicCache(config=config)
    batch, length = len(stacked.shapes), stacked.prefix
    # Masks are sized by the first layer, which is fed and has no keys of its own.
    nothing = torch.zeros(batch, 1, length, 1, dtype=stacked.keys.dtype, device=device)
    for layer in range(num_blocks):
        cache.update(nothing, nothing, layer)
    keys = stacked.keys.to(device, non_blocking=True)
    values = stacked.values.to(device, non_blocking=True)
    for layer in range(len(keys)):
        # With nothing first: what is given to update is copied.
        cache.update(keys[layer, :, :, :0], values[layer, :, :, :0], num_blocks + layer)
        held: Any = cache.layers[num_blocks + layer]
        held.keys, held.values = keys[layer], values[layer]
    return cache


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
        if key not in self._waiting and len(self._waiting) < MOST_AHEAD:
            self._waiting[key] = self._thread.submit(self.make, key)

    def take(self, indices: Sequence[int]) -> Stacked | None:
        """Return a batch that was announced; None if it was not, or if a shard is damaged."""
        key = tuple(indices)
        if key not in self._waiting:
            return None
        while True:  # batches come in the order of their announcement; others were left out
            announced, future = self._waiting.popitem(last=False)
            if announced == key:
                break
        try:
            return future.result()
        except CorruptShardError:
            return None
