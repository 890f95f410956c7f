"""Batches of like lengths, so that little is computed for padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

_POOL_BATCHES = 50
_MIN_POOLS = 4


class LikeLengths(Sampler[int]):
    """Yields every index once per epoch, so ordered that a batch holds examples of like lengths.

    Each epoch draws an order from ``seed`` and its number alone, so that a run that goes on finds
    the batches it would have had (that of transformers' ``LengthGroupedSampler``, whose idea this
    is, cannot be repeated). The order is cut into pools of up to 50 batches, a quarter of all
    examples at most; a pool is sorted by length and cut into batches, and the batches are shuffled.
    One that is not full comes last. So examples that meet in a batch are drawn from a pool rather
    than from all.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples of a batch, in each process.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch, counted from 0, the next time."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of an epoch."""
        number, size = len(self._lengths), self._batch_size
        generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch)
        order = torch.randperm(number, generator=generator).tolist()
        pool = size * max(1, min(_POOL_BATCHES, number // (size * _MIN_POOLS)))
        for start in range(0, number, pool):
            order[start : start + pool] = sorted(
                order[start : start + pool], key=lambda index: self._lengths[index]
            )
        batches = [order[start : start + size] for start in range(0, number, size)]
        num_full = number // size
        shuffled = torch.randperm(num_full, generator=generator).tolist()
        for batch in (*shuffled, *range(num_full, len(batches))):
            yield from batches[batch]
