"""A batch from a store: stacked, also ahead of time in a thread, and run through upper blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.caches import with_cache
from lowmem_reft.base.loss import needs_supervised_alone
from lowmem_reft.base.partial import feeding
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.packing import joined
from lowmem_reft.reuse.attention import attending_to_prefix
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
    rows: Sequence[Sequence[int]] | None = None
    """Which examples stand one after the other in each row of ``hidden``, where no example has a
    prefix: see ``data.packing``. None: each in its own."""

    @property
    def prefix(self) -> int:
        """Tokens of the longest prefix."""
        return self.keys.shape[3]


def stack(
    records: Sequence[Record],
    layout: Layout,
    *,
    pinned: bool,
    rows: Sequence[Sequence[int]] | None = None,
) -> Stacked:
    """Stack what is stored of examples, where it is; in pinned memory if that is asked for.

    With ``rows`` examples without prefixes stand one after the other: see ``data.packing``.
    """
    shapes = [Shape(record.keys.shape[2], record.hidden.shape[0]) for record in records]
    prefix = max(shape.prefix for shape in shapes)
    batch, first = len(records), records[0].hidden
    places = [[index] for index in range(batch)] if rows is None else rows
    width = max(sum(shapes[index].suffix for index in row) for row in places)
    zeros = partial(torch.zeros, dtype=first.dtype, device=first.device, pin_memory=pinned)
    hidden = zeros(len(places), width, layout.hidden_size)
    size = (layout.num_cached_layers, batch, layout.num_kv_heads, prefix, layout.head_dim)
    keys, values = zeros(size), zeros(size)
    for row, indices in enumerate(places):
        stop = 0
        for index in indices:
            start, stop = stop, stop + shapes[index].suffix
            hidden[row, start:stop] = records[index].hidden
    for row, (shape, record) in enumerate(zip(shapes, records, strict=True)):
        if shape.prefix:
            keys[:, row, :, prefix - shape.prefix :] = record.keys
            values[:, row, :, prefix - shape.prefix :] = record.values
    return Stacked(shapes=shapes, hidden=hidden, keys=keys, values=values, rows=rows)


def aligned(
    shapes: Sequence[Shape],
    values: Sequence[Sequence[int]],
    fill: int,
    rows: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Return one number per token, (batch, suffix): without prefixes, padded with ``fill``.

    ``values`` holds one number for each token of each example, or more. With ``rows`` examples
    stand one after the other, the first token of each with ``fill``: see ``data.packing``.
    """
    each: Sequence[Sequence[int]] = [
        numbers[shape.prefix : shape.length] for shape, numbers in zip(shapes, values, strict=True)
    ]
    if rows is not None:
        each = joined(each, rows, first=fill)
    tensors = [torch.tensor(numbers, dtype=torch.long) for numbers in each]
    return pad_sequence(tensors, batch_first=True, padding_value=fill)


def run_stacked(
    model: Any,
    num_blocks: int,
    stacked: Stacked,
    *,
    groups: Tensor | None = None,
    input_ids: Tensor | None = None,
    wrapped: Any = None,
    device_type: str | None = None,
    **arguments: Any,
) -> Any:
    """Return what a PeftModel returns for a batch that has passed its first ``num_blocks`` blocks.

    Args:
        model: The model.
        num_blocks: How many of its blocks.
        stacked: The batch.
        groups: (batch, suffix): the index of the φ that edits each token, or -1; with prefixes,
            where the model cannot tell the prompt from what it sees.
        input_ids: (batch, suffix): for models that look at them, such as classifiers.
        wrapped: What is called in the model's place: a wrapper around it.
        device_type: What a model on the meta device stands for.
        arguments: Further ones of the model's forward, such as ``labels``.
    """
    base = base_of(model)
    device = device_of(base)
    # A prediction on the meta device needs the values of the masks as well.
    there = torch.device("cpu") if device.type == "meta" else device
    hidden = stacked.hidden.to(device, non_blocking=True)
    if stacked.rows is not None:
        counted = joined([range(shape.length) for shape in stacked.shapes], stacked.rows)
        placed = pad_sequence([torch.tensor(row) for row in counted], batch_first=True)
        arguments |= {"inputs_embeds": hidden, "position_ids": placed.to(there), "use_cache": False}
        with feeding(model, num_blocks, hidden):
            return (wrapped or model)(**arguments)
    suffix, prefix = stacked.hidden.shape[1], stacked.prefix
    if prefix and needs_supervised_alone(base, arguments):
        suffix = _last_supervised(arguments.get("labels")) or suffix
        hidden = hidden[:, :suffix]
    own, length = torch.tensor(
        [[shape.prefix, shape.length] for shape in stacked.shapes]
    ).T.unsqueeze(2)
    columns = torch.arange(-prefix, suffix)
    mask = ((columns >= -own) & (columns < length - own)).long()
    # Padding repeats the last position: a table of positions may end there.
    positions = torch.minimum(own + torch.arange(suffix), length - 1)
    arguments["attention_mask"] = mask.to(there)
    arguments["use_cache"] = bool(prefix)
    if input_ids is None:
        arguments["inputs_embeds"] = hidden  # what the blocks below would get plays no part
    else:
        arguments["input_ids"] = input_ids.to(there)
    if prefix:
        assert groups is not None
        arguments["intervention_mask"] = groups[:, :suffix].to(there)
        arguments["position_ids"] = positions.to(there)
        arguments |= with_cache(base, _cache(base.config, num_blocks, stacked, device))
    kind = device_type or device.type
    with feeding(model, num_blocks, hidden), attending_to_prefix(prefix, kind):
        return (wrapped or model)(**arguments)


def _last_supervised(labels: Any) -> int:
    """Return where the last target stands, which no later token predicts; 0 if there is none."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return 0
    columns = (labels != IGNORED_LABEL).any(0).nonzero()
    return int(columns[-1]) if len(columns) else 0


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
    """Makes batches of indices in a thread before they are needed; ``make`` runs no model."""

    def __init__(self, make: Callable[[Sequence[int]], Stacked]) -> None:
        self.make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lowmem-reft-read-ahead")
        self._waiting: OrderedDict[tuple[int, ...], Future[Stacked]] = OrderedDict()

    def announce(self, indices: Sequence[int]) -> None:
        """Begin to read a batch."""
        key = tuple(map(int, indices))
        if key not in self._waiting and len(self._waiting) < MOST_AHEAD:
            self._waiting[key] = self._thread.submit(self.make, key)

    def take(self, indices: Sequence[int]) -> Stacked | None:
        """Return a batch that was announced; None if it was not, or if a shard is damaged."""
        key = tuple(map(int, indices))
        while key in self._waiting:  # batches come as they were announced; others were left out
            announced, future = self._waiting.popitem(last=False)
            if announced == key:
                with suppress(CorruptShardError):
                    return future.result()
        return None
