"""Computes what is stored: runs the frozen base over examples, like lengths together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.partial import feeding, keys_and_values, run_up_to
from lowmem_reft.reuse.layout import Layout
from lowmem_reft.reuse.store import Record, Store

if TYPE_CHECKING:
    from lowmem_reft.reuse.split import Example

BATCH_TOKENS = 4096
"""Tokens, padding included, that run together; an example that is longer runs alone."""


@dataclass(frozen=True, kw_only=True)
class Below:
    """Hidden vectors of all tokens that leave a lower block, to start from."""

    store: Store
    """Where they are."""
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
    """Return the constants of some examples.

    Args:
        model: A PeftModel.
        examples: The data set.
        indices: Which of them.
        layout: What is kept of each.
        num_blocks: Blocks whose outputs are constant.
        below: Where to start from; None starts from the tokens.
        training: Whether a training step will use them. Quantized layers may compute otherwise in
            evaluation mode: int8 on a CPU quantizes activations then.
    """
    order = sorted(indices, key=lambda index: -layout.shapes[index].length)
    records: dict[int, Record] = {}
    with _bare(model, training=training):
        while order:  # the longest first, so that it sets the length of its batch
            size = max(1, BATCH_TOKENS // max(1, layout.shapes[order[0]].length))
            part, order = order[:size], order[size:]
            batch = _Batch.of(model, examples, part, below)
            records.update(zip(part, batch.records(model, layout, num_blocks), strict=True))
    return [records[index] for index in indices]


@contextmanager
def _bare(model: Any, *, training: bool) -> Iterator[None]:
    """Run the base without its adapters, in training or evaluation mode."""
    base = base_of(model)
    was_training = base.training
    base.train(training)
    try:
        with without_adapters(model):
            yield
    finally:
        base.train(was_training)


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


@dataclass(frozen=True, kw_only=True)
class _Batch:
    indices: Sequence[int]
    inputs: dict[str, Tensor]
    """``attention_mask`` and ``input_ids`` or, from a lower store, ``inputs_embeds``."""
    num_blocks: int
    """Blocks that ``inputs_embeds`` have passed."""

    @classmethod
    def of(
        cls, model: Any, examples: Sequence[Example], indices: Sequence[int], below: Below | None
    ) -> _Batch:
        """Stack examples, padded on the right."""
        device = device_of(model)
        lengths = [len(examples[index]["input_ids"]) for index in indices]
        mask = torch.zeros(len(indices), max(lengths), dtype=torch.long)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
        if below is None:
            ids = torch.zeros_like(mask)
            for row, index in enumerate(indices):
                ids[row, : lengths[row]] = torch.tensor(examples[index]["input_ids"])
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            return cls(indices=indices, inputs=inputs, num_blocks=0)
        stored = [below.store.read(index).hidden for index in indices]
        hidden = stored[0].new_zeros(*mask.shape, stored[0].shape[1])
        for row, part in enumerate(stored):
            hidden[row, : len(part)] = part
        inputs = {"inputs_embeds": hidden.to(device), "attention_mask": mask.to(device)}
        return cls(indices=indices, inputs=inputs, num_blocks=below.num_blocks)

    def records(self, model: Any, layout: Layout, num_blocks: int) -> list[Record]:
        """Return the constants of the batch's examples."""
        hidden = self._hidden(model, num_blocks)
        shapes = [layout.shapes[index] for index in self.indices]
        prefix = max(shape.prefix for shape in shapes)
        keys, values = self._keys_and_values(model, layout, num_blocks, hidden, prefix)
        records = []
        for row, shape in enumerate(shapes):
            kept = hidden[row, shape.prefix : shape.length]
            before = (part[:, row, :, : shape.prefix].cpu() for part in (keys, values))
            records.append(Record(kept.cpu(), *before))
        return records

    def _hidden(self, model: Any, num_blocks: int) -> Tensor:
        """Return the trunk's output, (batch, seq, hidden)."""
        if self.num_blocks == 0:
            return run_up_to(model, num_blocks, self.inputs)
        hidden = self.inputs["inputs_embeds"]
        if self.num_blocks == num_blocks:
            return hidden
        with feeding(model, self.num_blocks, hidden):
            return run_up_to(model, num_blocks, self.inputs)

    def _keys_and_values(
        self, model: Any, layout: Layout, num_blocks: int, hidden: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return keys and values of the blocks above for the first tokens.

        Each is (layers, batch, heads, length, head_dim).
        """
        if length == 0 or layout.num_cached_layers == 0:
            size = (layout.num_kv_heads, length, layout.head_dim)
            empty = hidden.new_empty(layout.num_cached_layers, len(hidden), *size)
            return empty, empty
        hidden = hidden[:, :length]
        mask = self.inputs["attention_mask"][:, :length]
        with feeding(model, num_blocks, hidden):
            pairs = keys_and_values(
                model, num_blocks, {"inputs_embeds": hidden, "attention_mask": mask}
            )
        keys, values = (torch.stack(part) for part in zip(*pairs, strict=True))
        return keys, values
