"""P: which tokens are edited, as a mask. ``"f7+l7"``: the prompt's first 7 and last 7 tokens.

``"+response"`` edits the tokens of the answer as well: in training those from the first supervised
one on, in generation each new one that is read again. ``"every"`` is ``"all+response"``.

Everything here follows from masks, never from token ids, so padding side, pad == eos and a missing
BOS do not matter. The result is one integer per token: the index of the parameter set φ that edits
it, or -1. A token has at most one intervention by construction.

Source: arXiv 2404.03592, section 3 (P) and 4 (the hyperparameters p, s and tying). Every token,
new ones too: arXiv 2402.15179 (RED), 1902.00751 (bottlenecks), 2308.10248 (steering vectors).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.errors import InputError

TIES = ("tied", "sides", "positions")
_MOST_DIGITS = 9
EVERY = "every"
GRAMMAR = (
    "'all', 'fN' (first N), 'lN' (last N) or 'fN+lM' of the prompt, with N and M at least 1, each "
    "perhaps with '+response' (the answer's tokens), or 'response' or 'every' ('all+response')"
)

_SPEC = re.compile(r"(?:f(?P<first>[1-9]\d*))?(?P<plus>\+)?(?:l(?P<last>[1-9]\d*))?")


@dataclass(frozen=True, kw_only=True)
class Positions:
    """A parsed position specification, relative to the prompt."""

    first: int = 0
    """Prompt tokens edited at the start."""
    last: int = 0
    """Prompt tokens edited at the end."""
    prompt: bool = False
    """All prompt tokens; ``first`` and ``last`` are then 0."""
    response: bool = False
    """All tokens of the answer."""


def parse_positions(spec: str) -> Positions:
    """Parse ``"all"``, ``"f7"``, ``"l1"``, ``"f7+l7"``, ``"l1+response"``, ``"every"``, ...

    Raises:
        InputError: The specification does not follow the grammar, which the message shows.
    """
    return _parse(spec.strip() if isinstance(spec, str) else "", repr(spec))


@cache  # asked for each new token
def _parse(text: str, shown: str) -> Positions:
    *before, end = ("all+response" if text == EVERY else text).split("+")
    response = end == "response"
    parts = before if response else [*before, end]
    if parts == ["all"] or (response and not parts):
        return Positions(prompt=bool(parts), response=response)
    match = _SPEC.fullmatch("+".join(parts))
    first, last = (match["first"], match["last"]) if match else (None, None)
    if not match or not (first or last) or bool(match["plus"]) != bool(first and last):
        raise InputError(f"positions must be {GRAMMAR}, got {shown}; for example 'f7+l7'")
    if max(len(first or ""), len(last or "")) > _MOST_DIGITS:
        raise InputError(
            f"positions must have numbers of at most {_MOST_DIGITS} digits, got {shown}; lower it"
        )
    return Positions(first=int(first or 0), last=int(last or 0), response=response)


def num_groups(positions: Positions, tie: str) -> int:
    """Return how many parameter sets φ a layer needs: 1, one per side, or one per position.

    The prompt's start, its end (or all of it) and the answer are sides. The answer has one φ, the
    last, whatever its length.

    Raises:
        InputError: ``tie`` asks for one φ per token of a whole prompt, or for sides of one.
    """
    if tie not in TIES:
        raise InputError(f"tie must be one of {', '.join(TIES)}, got {tie!r}; choose one of them")
    if tie == "tied":
        return 1
    if positions.prompt and (tie == "positions" or not positions.response):
        ties = "'tied' or 'sides'" if positions.response else "'tied'"
        spec = EVERY if positions.response else "all"
        raise InputError(
            f"tie must be {ties} with positions={spec!r}, got {tie!r}; prompts differ in length"
        )
    if tie == "sides":
        sides = (positions.prompt, positions.first, positions.last, positions.response)
        return sum(map(bool, sides))
    return positions.first + positions.last + positions.response


def find_prompt(
    attention_mask: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"] | None = None,
    segments: Int[Tensor, "batch seq"] | None = None,
) -> Bool[Tensor, "batch seq"]:
    """Mark the prompt: attended, not supervised, and before the first supervised token.

    Without labels every attended token is prompt. Of several supervised spans in one example the
    first one's prompt counts; `has_later_prompt` tells whether there are such.

    Args:
        attention_mask: Nonzero where a token is attended.
        labels: -100 where a token is not supervised.
        segments: Non-decreasing ids of the samples packed into a row; default: one sample a row.
    """
    attended = attention_mask.bool()
    if labels is None:
        return attended
    supervised = (labels != IGNORED_LABEL) & attended
    return attended & (_running_count(supervised, segments) == 0)


def assign_groups(
    positions: Positions,
    tie: str,
    prompt: Bool[Tensor, "batch seq"],
    segments: Int[Tensor, "batch seq"] | None = None,
    attended: Bool[Tensor, "batch seq"] | None = None,
) -> Int[Tensor, "batch seq"]:
    """Return for each token the index of the φ that edits it, or -1.

    A prompt of n < first + last tokens is shared out: the prefix side gets
    min(first, max(n // 2, n - last)) tokens and the suffix side the rest, so every token is edited
    once. With ``tie="positions"`` the prefix is numbered from the start and the suffix from the
    end: the last prompt token always has the φ before that of the answer.

    Args:
        positions: What is edited.
        tie: Which of it shares a φ.
        prompt: The tokens of prompts.
        segments: Non-decreasing ids of the samples packed into a row; default: one sample a row.
        attended: All tokens: those that follow a prompt are its answer. None: there are no others.
    """
    groups = _assign_prompt(positions, tie, prompt, segments)
    if not positions.response or attended is None:
        return groups
    response = find_response(attended, prompt, segments)
    return torch.where(response, num_groups(positions, tie) - 1, groups)


def find_response(
    attended: Bool[Tensor, "batch seq"],
    prompt: Bool[Tensor, "batch seq"],
    segments: Int[Tensor, "batch seq"] | None = None,
) -> Bool[Tensor, "batch seq"]:
    """Mark the answer: attended, no prompt, and after one, unless the sample has none at all."""
    flipped = None if segments is None else segments.flip(1).neg()
    has_before = _running_count(prompt, segments) > 0
    has_after = _running_count(prompt.flip(1), flipped).flip(1) > 0
    return attended & ~prompt & (has_before | ~has_after)


def _assign_prompt(
    positions: Positions, tie: str, prompt: Tensor, segments: Tensor | None
) -> Tensor:
    if positions.prompt:
        return torch.where(prompt, 0, -1)
    if not positions.first and not positions.last:
        return torch.full_like(prompt, -1, dtype=torch.long)
    from_start = _running_count(prompt, segments) - 1
    flipped = None if segments is None else segments.flip(1).neg()
    from_end = _running_count(prompt.flip(1), flipped).flip(1) - 1
    length = from_start + from_end + 1
    num_first = torch.maximum(length // 2, length - positions.last).clamp(max=positions.first)
    num_last = (length - num_first).clamp(max=positions.last)
    in_prefix, in_suffix = prompt & (from_start < num_first), prompt & (from_end < num_last)
    prefix_group, suffix_group = torch.zeros_like(length), torch.zeros_like(length)
    if tie == "sides":
        suffix_group += bool(positions.first)
    elif tie == "positions":
        prefix_group = from_start
        suffix_group = positions.first + positions.last - 1 - from_end
    groups = torch.where(in_suffix, suffix_group, torch.full_like(length, -1))
    return torch.where(in_prefix, prefix_group, groups)


def packed_segments(
    position_ids: Int[Tensor, "batch seq"] | None, attention_mask: Int[Tensor, "batch seq"]
) -> Int[Tensor, "batch seq"] | None:
    """Return sample ids where position ids start again at 0 inside a row (packing), else None."""
    if position_ids is None or position_ids.ndim != 2:
        return None
    position_ids = position_ids.expand_as(attention_mask)
    starts = (position_ids == 0) & attention_mask.bool()
    if not bool((starts.sum(1) > 1).any()):
        return None
    return starts.long().cumsum(1)


def _running_count(
    mask: Bool[Tensor, "batch seq"], segments: Int[Tensor, "batch seq"] | None
) -> Int[Tensor, "batch seq"]:
    """Count the marked tokens up to and including each token, from the start of its sample."""
    count = mask.long().cumsum(1)
    if segments is None:
        return count
    index = torch.arange(mask.shape[1], device=mask.device).expand_as(segments)
    is_start = torch.ones_like(mask)
    is_start[:, 1:] = segments[:, 1:] != segments[:, :-1]
    start = torch.where(is_start, index, torch.zeros_like(index)).cummax(1).values
    return count - (count - mask.long()).gather(1, start)


def has_later_prompt(
    attention_mask: Int[Tensor, "batch seq"],
    labels: Int[Tensor, "batch seq"],
    segments: Int[Tensor, "batch seq"] | None = None,
) -> bool:
    """Whether some sample has a second prompt: unsupervised tokens between supervised ones."""
    attended = attention_mask.bool()
    supervised = (labels != IGNORED_LABEL) & attended
    gap = attended & ~supervised & (_running_count(supervised, segments) > 0)
    return bool((supervised & (_running_count(gap, segments) > 0)).any())
