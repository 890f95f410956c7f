"""What a store holds of each example, and where: tokens that examples have in common count once.

On a causal model the constants of a token depend on the tokens before it alone, so examples that
begin alike (one system prompt, one question with several answers) have them in common. Sorted by
their tokens, each example shares most with the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

import torch

from lowmem_reft.base.blocks import find_blocks, hidden_size
from lowmem_reft.machine.devices import DTYPES, dtype_name

SHARD_BYTES = 2**26
MIN_SHARED_TOKENS = 8
"""Fewer tokens in common (a BOS, a template's first word) are stored again: reading is simpler."""


class Extent(NamedTuple):
    """Tokens whose numbers stand together in what one example owns."""

    owner: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many."""
        return self.stop - self.start

    def within(self, whole: Extent) -> slice:
        """Return where they stand among more tokens."""
        return slice(self.start - whole.start, self.stop - whole.start)


class Address(NamedTuple):
    """Where the numbers that an example owns begin: a shard, and bytes in it."""

    shard: int
    offset: int


@dataclass(frozen=True)
class Shape:
    """Tokens of one example: keys and values of the prefix are kept, hidden vectors after it."""

    prefix: int
    suffix: int

    @property
    def length(self) -> int:
        """All tokens."""
        return self.prefix + self.suffix


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes and places of everything in a store."""

    shapes: Sequence[Shape]
    """One per example."""
    hidden_size: int
    num_cached_layers: int
    """Blocks whose keys and values are kept."""
    num_kv_heads: int
    head_dim: int
    dtype: str
    """bf16, fp16 or fp32, as the base computes."""
    order: Sequence[int] = ()
    """Examples as they stand in the store; default: as they come."""
    shared: Sequence[int] = ()
    """Per place in that order: leading tokens in common with the example just before it."""

    @classmethod
    def of(
        cls,
        base: Any,
        num_blocks: int,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        common: tuple[Sequence[int], Sequence[int]] = ((), ()),
    ) -> Layout:
        """Return the layout for a transformers model that computes in ``dtype``.

        The outputs of its first ``num_blocks`` blocks are constant; ``common`` is from
        ``in_common``.
        """
        config, width = base.config.get_text_config(), hidden_size(base)
        heads = config.num_attention_heads
        return cls(
            shapes=shapes,
            hidden_size=width,
            num_cached_layers=len(find_blocks(base)[1]) - num_blocks,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or width // heads,
            dtype=dtype_name(dtype),
            order=common[0],
            shared=common[1],
        )

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden vector."""
        return DTYPES[self.dtype].itemsize * self.hidden_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        width = self.num_cached_layers * self.num_kv_heads * self.head_dim
        return 2 * DTYPES[self.dtype].itemsize * width

    @cached_property
    def examples(self) -> Sequence[int]:
        """Examples in the store's order."""
        return self.order or range(len(self.shapes))

    @cached_property
    def hidden_extents(self) -> list[list[Extent]]:
        """Where the hidden vectors of each example stand, in order; the last are its own."""
        return self._extents(lambda shape: (shape.prefix, shape.length))

    @cached_property
    def kv_extents(self) -> list[list[Extent]]:
        """Where its keys and values stand."""
        return self._extents(lambda shape: (0, shape.prefix))

    def _extents(self, span: Callable[[Shape], tuple[int, int]]) -> list[list[Extent]]:
        found: list[list[Extent]] = [[] for _ in self.shapes]
        before: list[Extent] = []
        for place, example in enumerate(self.examples):
            start, stop = span(self.shapes[example])
            taken = _clip(before, start, min(stop, self.shared[place] if self.shared else 0))
            own = Extent(example, taken[-1].stop if taken else start, stop)
            before = found[example] = [*taken, own]
        return found

    def own_hidden(self, example: int) -> Extent:
        """Return the tokens whose hidden vectors the example owns; may be none."""
        return self.hidden_extents[example][-1]

    def own_kv(self, example: int) -> Extent:
        """Return the tokens whose keys and values it owns."""
        return self.kv_extents[example][-1]

    def num_bytes(self, example: int) -> int:
        """Return the bytes that the example owns."""
        hidden, kv = self.own_hidden(example), self.own_kv(example)
        return self.hidden_bytes * hidden.size + self.kv_bytes * kv.size

    @cached_property
    def shards(self) -> list[list[int]]:
        """Examples of each shard."""
        shards: list[list[int]] = [[]]
        filled = 0
        for example in self.examples:
            size = self.num_bytes(example)
            if shards[-1] and filled + size > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(example)
            filled += size
        return shards

    @cached_property
    def addresses(self) -> list[Address]:
        """Where what each example owns begins: hidden vectors, then keys, then values."""
        addresses = [Address(0, 0)] * len(self.shapes)
        for shard, examples in enumerate(self.shards):
            offset = 0
            for example in examples:
                addresses[example] = Address(shard, offset)
                offset += self.num_bytes(example)
        return addresses

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.num_bytes(example) for example in range(len(self.shapes)))


def in_common(
    tokens: Sequence[Sequence[int]], *, causal: bool
) -> tuple[Sequence[int], Sequence[int]]:
    """Return an order of examples, and how many leading tokens each shares with the one before.

    Args:
        tokens: Token ids of each example.
        causal: Whether constants depend on earlier tokens alone; if not, only equal examples share.
    """
    order = sorted(range(len(tokens)), key=lambda example: (list(tokens[example]), example))
    shared = [0] * len(order)
    for place in range(1, len(order)):
        first, second = tokens[order[place - 1]], tokens[order[place]]
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
        count = sum(1 for _ in alike)
        whole = count == len(first) == len(second)
        if whole or (causal and count >= MIN_SHARED_TOKENS):
            shared[place] = count
    return order, shared


def _clip(extents: Sequence[Extent], start: int, stop: int) -> list[Extent]:
    """Return the part from ``start`` to ``stop``, if they hold ``start``, else nothing."""
    if not extents or extents[0].start > start or stop <= start:
        return []
    return [
        Extent(owner, max(first, start), min(last, stop))
        for owner, first, last in extents
        if first < stop and last > start
    ]
