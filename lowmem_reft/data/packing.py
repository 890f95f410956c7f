"""Examples of a batch one after the other in rows, so that little is computed for padding.

Position ids start again at 0 with each example, by which a model tells them apart, and there is no
attention mask (the idea is TRL's ``bfd`` packing; here a batch keeps its examples). A token of
padding has position 0 and no other after it: it is an example of its own, which nothing supervises.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Pack = Callable[[Sequence[int]], list[list[int]] | None]
"""Tells by the lengths of a batch's examples which stand in each row; None: each has its own."""


PAIRS_FOR_TOKEN = 1024
"""Pairs in a mask that are less than a token's activations, in bytes."""


def packed_rows(lengths: Sequence[int], *, pairs_for_token: int = 0) -> list[list[int]] | None:
    """Return which examples of a batch stand in each row; None: each in a row of its own.

    For every number of rows the longest examples come first, each into the row with the fewest
    tokens. Of the layouts that need no more pairs of tokens than the padded batch, which attention
    and its mask take, the one with the fewest tokens is returned: so neither time nor memory are
    more than those of padding.

    Args:
        lengths: Tokens of each example.
        pairs_for_token: How many more pairs a layout may have for each token of padding that it
            spares: `PAIRS_FOR_TOKEN` where only the mask has them, a byte each.
    """
    number, longest = len(lengths), max(lengths)
    order = sorted(range(number), key=lambda index: -lengths[index])
    padded = best = (number * longest, number * longest**2)
    found = None
    for count in range(1, number):
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [(0, row) for row in range(count)]
        for index in order:
            tokens, row = filled[0]
            rows[row].append(index)
            heapq.heapreplace(filled, (tokens + lengths[index], row))
        width = max(filled)[0]
        size = (count * width, count * width**2)
        allowed = padded[1] + pairs_for_token * (padded[0] - size[0])
        if size[1] <= allowed and size < best:
            best, found = size, rows
    return found


def joined(
    values: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], *, first: int | None = None
) -> list[list[int]]:
    """Put the numbers of examples one after the other in rows; ``first`` replaces each's first."""
    if first is not None:
        values = [[first, *numbers[1:]] for numbers in values]
    return [[number for index in row for number in values[index]] for row in rows]


def is_of_rows(batch: dict[str, Any]) -> Tensor:
    """Return (batch, seq): nonzero for the tokens of a batch, packed or not, that are no padding.

    A packed example has at least two tokens.
    """
    mask: Tensor | None = batch.get("attention_mask")
    if mask is not None:
        return mask
    positions: Tensor = batch["position_ids"]
    begins = (positions == 0) & (positions.roll(-1, 1) == 1)
    begins[:, -1] = False
    return (positions > 0) | begins


def token_ids(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return the tokens of each example of a batch, packed or not, without padding."""
    kept = is_of_rows(batch).bool().cpu()
    each = [row[mask].tolist() for row, mask in zip(batch["input_ids"].cpu(), kept, strict=True)]
    if batch.get("attention_mask") is not None:
        return [tuple(ids) for ids in each]
    places = [
        row[mask].tolist() for row, mask in zip(batch["position_ids"].cpu(), kept, strict=True)
    ]
    found = []
    for ids, positions in zip(each, places, strict=True):
        starts = [place for place, position in enumerate(positions) if position == 0]
        ends = [*starts[1:], len(ids)]
        found += [tuple(ids[start:end]) for start, end in zip(starts, ends, strict=True)]
    return found
