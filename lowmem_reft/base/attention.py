"""Attention of rows that hold several examples: each attends within itself, which is all there is.

transformers tells packed examples apart by a mask over all pairs of a row's tokens, and torch's
kernels compute the pairs that it forbids. Here the mask is read once for all layers, and rows are
divided where no token attends across; each part gets the kernel and its part of the mask.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

BY_TORCH = "sdpa"
"""transformers' name of attention by torch's kernels."""

Attention = Callable[..., Any]
"""An attention function of transformers: module, query, key, value, mask; output and weights."""


@contextmanager
def in_place_of_torchs(make: Callable[[Attention], Attention]) -> Iterator[None]:
    """Let models use another attention for a while; ``make`` makes it of the one by torch."""
    plain = ALL_ATTENTION_FUNCTIONS[BY_TORCH]
    ALL_ATTENTION_FUNCTIONS[BY_TORCH] = make(plain)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[BY_TORCH]
        if ALL_ATTENTION_FUNCTIONS.get(BY_TORCH) is not plain:  # somebody's own
            ALL_ATTENTION_FUNCTIONS[BY_TORCH] = plain


def within_examples() -> AbstractContextManager[None]:
    """Let packed examples attend each within itself for a while; other rows attend as ever."""
    return in_place_of_torchs(lambda plain: partial(_attend, plain, _Parts()))


class _Parts:
    """The lengths of the parts of each row of the masks in use."""

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[Tensor], list[list[int]] | None]] = []

    def of(self, mask: Tensor) -> list[list[int]] | None:
        self._known = [(alive, parts) for alive, parts in self._known if alive() is not None]
        for alive, parts in self._known:
            if alive() is mask:
                return parts
        found = divided(mask)
        self._known.append((weakref.ref(mask), found))
        return found


def divided(mask: Tensor) -> list[list[int]] | None:
    """Return for each row the lengths of its parts; None if it is no mask of packed examples.

    Args:
        mask: (rows, 1, tokens, tokens): True where a token attends.
    """
    if not mask.diagonal(dim1=2, dim2=3).all():  # padding of rows that are not packed
        return None
    found = []
    for row in mask[:, 0]:
        starts = [0, *(row.diagonal(-1).logical_not().nonzero()[:, 0] + 1).tolist()]
        # Padding is one part: each of its tokens is an example.
        starts = [
            start
            for start, before, after in zip(
                starts, [-2, *starts], [*starts[1:], len(row)], strict=False
            )
            if not (start == before + 1 and after == start + 1)
        ]
        sizes = [end - start for start, end in itertools.pairwise([*starts, len(row)])]
        within = sum(
            int(row[start : start + size, start : start + size].count_nonzero())
            for start, size in zip(starts, sizes, strict=True)
        )
        if within != int(row.count_nonzero()):
            return None
        found.append(sizes)
    return found if any(len(sizes) > 1 for sizes in found) else None


def _attend(
    plain: Attention,
    parts: _Parts,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Be an attention function of transformers; ``plain`` is the one that would have run."""
    tokens = query.shape[2]
    is_known = (
        attention_mask is not None
        and attention_mask.dtype == torch.bool
        and tuple(attention_mask.shape) == (query.shape[0], 1, tokens, tokens)
        and key.shape[2] == tokens
        and kwargs.get("position_bias") is None
    )
    rows = parts.of(attention_mask) if is_known and attention_mask is not None else None
    if rows is None or attention_mask is None:
        return plain(module, query, key, value, attention_mask, *args, **kwargs)
    # Split, not sliced: the gradients of slices would each be as large as the whole.
    found = []
    for sizes, mask, *of_row in zip(
        rows, attention_mask, query.split(1), key.split(1), value.split(1), strict=True
    ):
        start, outs = 0, []
        for size, *of_part in zip(sizes, *(each.split(sizes, 2) for each in of_row), strict=True):
            within = slice(start, start + size)
            out, _ = plain(module, *of_part, mask[None, :, within, within], *args, **kwargs)
            outs.append(out)
            start += size
        found.append(torch.cat(outs, 1))
    return torch.cat(found), None
