"""Computes what is stored: runs the frozen base over examples, like lengths together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.partial import feeding, keys_and_values, run_up_to
from lowmem_reft.reuse.layout import Layout, Shape
from lowmem_reft.reuse.store import Record, Store

if TYPE_CHECKING:
    from lowmem_reft.reuse.split import Example

BATCH_TOKENS = 4096
"""Tokens, padding included, that run together; an example that is longer runs alone."""


class Below(NamedTuple):
    """A store of the hidden vectors of all tokens that leave a lower block, to start from."""

    store: Store
    num_blocks: int
    """Blocks that they have passed."""


@torch.no_grad()
def compute(
    model: Any,
    examples: Sequence[Example],
    indices: Sequence[int],
    layout: Layout,
    num_blocks: int,
    below: Below | None = None,
    *,
    training: bool = True,
) -> list[Record]:
    """Return what is to be stored of the examples of some indices, on the CPU.

    It starts from the tokens, or from a lower store. Whether a training step will use it matters:
    quantized layers may compute otherwise in evaluation mode (int8 on a CPU quantizes activations
    then).
    """
    order = sorted(indices, key=lambda index: -layout.shapes[index].length)
    records: dict[int, Record] = {}
    base = base_of(model)
    was_training = base.training
    base.train(training)
    try:
        with without_adapters(model):
            while order:  # the longest first, so that it sets the length of its batch
                size = max(1, BATCH_TOKENS // max(1, layout.shapes[order[0]].length))
                part, order = order[:size], order[size:]
                hidden, mask = _trunk(model, examples, part, num_blocks, below)
                shapes = [layout.shapes[index] for index in part]
                found = records_of(model, layout, num_blocks, shapes, hidden, mask)
                records.update(zip(part, (record.cpu() for record in found), strict=True))
    finally:
        base.train(was_training)
    return [records[index] for index in indices]


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Run the base alone; what required a gradient does so again afterwards, and nothing else."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _trunk(
    model: Any,
    examples: Sequence[Example],
    indices: Sequence[int],
    num_blocks: int,
    below: Below | None,
) -> tuple[Tensor, Tensor]:
    """Return the output of the constant blocks, (batch, seq, hidden), and the mask of tokens.

    Both are padded on the right.
    """
    tokens = [torch.tensor(examples[i]["input_ids"], dtype=torch.long) for i in indices]
    mask = pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True)
    inputs = {"attention_mask": mask.to(device_of(model))}
    if below is None:
        ids = pad_sequence(tokens, batch_first=True)
        inputs["input_ids"] = ids.to(device_of(model))
        return run_up_to(model, num_blocks, inputs), inputs["attention_mask"]
    stored = [below.store.read(index).hidden for index in indices]
    hidden = pad_sequence(stored, batch_first=True).to(device_of(model))
    if below.num_blocks < num_blocks:
        with feeding(model, below.num_blocks, hidden):
            hidden = run_up_to(model, num_blocks, {**inputs, "inputs_embeds": hidden})
    return hidden, inputs["attention_mask"]


def records_of(
    model: Any,
    layout: Layout,
    num_blocks: int,
    shapes: Sequence[Shape],
    hidden: Tensor,
    mask: Tensor,
) -> list[Record]:
    """Return what is kept of a batch, with keys and values of the prefixes in the blocks above.

    The model runs without its adapters. ``hidden``, (batch, seq, hidden) and padded on the right,
    has left the constant blocks; ``mask``, (batch, at least the longest prefix), is 1 for tokens.
    """
    prefix = max(shape.prefix for shape in shapes)
    if prefix and layout.num_cached_layers:
        before, mask = hidden[:, :prefix], mask[:, :prefix]
        with feeding(model, num_blocks, before):
            inputs = {"inputs_embeds": before, "attention_mask": mask}
            pairs = keys_and_values(model, num_blocks, inputs)
        keys, values = (torch.stack(part) for part in zip(*pairs, strict=True))
    else:
        size = (len(shapes), layout.num_kv_heads, prefix, layout.head_dim)
        keys = values = hidden.new_empty(layout.num_cached_layers, *size)
    return [
        Record(
            hidden[row, shape.prefix : shape.length],
            keys[:, row, :, : shape.prefix],
            values[:, row, :, : shape.prefix],
        )
        for row, shape in enumerate(shapes)
    ]
