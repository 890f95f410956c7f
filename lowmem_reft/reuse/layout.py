"""What a store holds of each example, and where: tokens that examples have in common count once.

On a causal model the constants of a token depend on the tokens before it alone, so examples that
begin alike (one system prompt, one question with several answers) have them in common. Sorted by
their tokens, each example shares most with the one before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from lowmem_reft.base.blocks import find_blocks, hidden_size
from lowmem_reft.machine.devices import DTYPES, dtype_name

SHARD_BYTES = 2**26
MIN_SHARED_TOKENS = 8
"""Fewer tokens in common (a BOS, a template's first word) are stored again: reading is simpler."""


class Run(NamedTuple):
    """Tokens whose constants stand together in what one example owns."""

    owner: int
    start: int
    stop: int


class Place(NamedTuple):
    """Where an example's own constants begin."""

    shard: int
    offset: int
    """Bytes."""


@dataclass(frozen=True)
class Shape:
    """What is kept for one example."""

    prefix: int
    """Tokens whose keys and values are kept."""
    suffix: int
    """Tokens after them, whose hidden vectors are kept."""

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
    """Width of a hidden vector."""
    num_cached_layers: int
    """Blocks whose keys and values are kept."""
    num_kv_heads: int
    """Key and value heads of each."""
    head_dim: int
    """Width of each."""
    dtype: str
    """bf16, fp16 or fp32, as the base computes."""
    order: Sequence[int] = ()
    """Examples as they stand in the store; default: as they come."""
    shared: Sequence[int] = field(default=())
    """Per place in that order: leading tokens in common with the example just before it."""

    @classmethod
    def of(
        cls,
        base: Any,
        num_blocks: int,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        *,
        order: Sequence[int] = (),
        shared: Sequence[int] = (),
    ) -> Layout:
        """Return the layout of a base's constants.

        Args:
            base: A transformers model.
            num_blocks: Blocks whose outputs are constant.
            shapes: One per example.
            dtype: What the base computes in.
            order: See ``in_common``.
            shared: See ``in_common``.
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
            order=order,
            shared=shared,
        )

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return DTYPES[self.dtype].itemsize

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden vector."""
        return self.itemsize * self.hidden_size

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.itemsize * self.num_cached_layers * self.num_kv_heads * self.head_dim

    @cached_property
    def examples(self) -> Sequence[int]:
        """Examples in the store's order."""
        return self.order or range(len(self.shapes))

    @cached_property
    def _runs(self) -> tuple[list[list[Run]], list[list[Run]]]:
        """Return the runs of each example's hidden vectors, and of its keys and values."""
        hidden: list[list[Run]] = [[] for _ in self.shapes]
        kv: list[list[Run]] = [[] for _ in self.shapes]
        before: int | None = None
        for place, example in enumerate(self.examples):
            shape = self.shapes[example]
            common = self.shared[place] if self.shared and before is not None else 0
            for runs, start, stop in (
                (kv, 0, shape.prefix),
                (hidden, shape.prefix, shape.length),
            ):
                taken = [] if before is None else _clip(runs[before], start, min(stop, common))
                covered = taken[-1].stop if taken else start
                own = [Run(example, covered, stop)] if covered < stop else []
                runs[example] = taken + own
            before = example
        return hidden, kv

    def hidden_runs(self, example: int) -> list[Run]:
        """Return where the example's hidden vectors stand, in order."""
        return self._runs[0][example]

    def kv_runs(self, example: int) -> list[Run]:
        """Return where its keys and values stand, in order."""
        return self._runs[1][example]

    def own_hidden(self, example: int) -> Run:
        """Return the tokens whose hidden vectors stand in the example's own place; may be none."""
        return _own(self.hidden_runs(example), example, self.shapes[example].length)

    def own_kv(self, example: int) -> Run:
        """Return the tokens whose keys and values stand in the example's own place."""
        return _own(self.kv_runs(example), example, self.shapes[example].prefix)

    def num_bytes(self, example: int) -> int:
        """Return the bytes that the example owns."""
        hidden, kv = self.own_hidden(example), self.own_kv(example)
        return self.hidden_bytes * (hidden.stop - hidden.start) + self.kv_bytes * (
            kv.stop - kv.start
        )

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
    def places(self) -> list[Place]:
        """Where each example's own constants begin: hidden vectors, then keys, then values."""
        places = [Place(0, 0)] * len(self.shapes)
        for shard, examples in enumerate(self.shards):
            offset = 0
            for example in examples:
                places[example] = Place(shard, offset)
                offset += self.num_bytes(example)
        return places

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
        count = _common_length(first, second)
        whole = count == len(first) == len(second)
        if whole or (causal and count >= MIN_SHARED_TOKENS):
            shared[place] = count
    return order, shared


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return count
    return min(len(first), len(second))


def _clip(runs: Sequence[Run], start: int, stop: int) -> list[Run]:
    """Return the part of runs from ``start`` to ``stop``, if they hold ``start``, else nothing."""
    if not runs or runs[0].start > start or stop <= start:
        return []
    clipped = [
        Run(owner, max(first, start), min(last, stop))
        for owner, first, last in runs
        if first < stop and last > start
    ]
    return clipped


def _own(runs: Sequence[Run], example: int, end: int) -> Run:
    return runs[-1] if runs and runs[-1].owner == example else Run(example, end, end)
