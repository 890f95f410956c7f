"""Where the tokens of a forward pass stand: in a prompt, or past it.

In a ``generate`` the prompt is known beforehand and every forward pass is counted: what has been
read so far tells which tokens come next. What else can be seen of the past, the length of a cache
or the width of the attention mask, has to agree with it. Outside of ``generate`` that is all there
is, and one token after others is read as a new one.

Where the two disagree, or nothing of the past can be seen, the pass is refused: edits of the wrong
tokens would go unnoticed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem_reft.base.caches import Seen, caches_in, states_in, tokens_in
from lowmem_reft.errors import InputError
from lowmem_reft.machine.provenance import installed

# Arguments of a forward pass that hold tensors and are no cache.
_NO_CACHE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels")

_REMEDY = (
    "give intervention_mask, which names the tokens to edit in each pass, or let generate read the "
    "prompt (prefill_chunk_size reads it in parts)"
)


@dataclass(slots=True, eq=False)
class Branch:
    """What a ``generate`` goes on with, and how much of it was read so far."""

    inputs: dict[str, Tensor]
    """The prompt: ``input_ids`` (batch, given), ``inputs_embeds`` (batch, given, hidden), or both.
    Empty where ``generate`` makes it up; then it is what the first pass reads."""
    mask: Tensor | None
    """(batch, prompt): the attended tokens, perhaps with some in front that a cache holds."""
    choice: Tensor | None = None
    """(batch, prompt): the caller's own ``intervention_mask``."""
    num_read: int = 0
    num_passes: int = 0
    caches: list[Any] = field(default_factory=list)
    """What holds it: the caches that the last pass was given, and what it returned."""

    @property
    def prompt_length(self) -> int:
        """The number of tokens in the prompt."""
        return 0 if self.mask is None else int(self.mask.shape[1])

    def has_next(self, call: dict[str, Any], start: int) -> bool:
        """Return whether a pass reads this prompt from ``start`` on, as far as the prompt goes."""
        name = _input_name(call)
        mine, given = self.inputs.get(name), call[name]
        if mine is None:
            return False
        start -= self.prompt_length - mine.shape[1]  # those in front are not given again
        mine = mine[:, max(start, 0) :][:, : given.shape[1]]
        if start < 0 or mine.shape[1] == 0 or given.shape[0] % mine.shape[0]:
            return False
        # Beams and returned sequences repeat each example in place.
        mine = mine.repeat_interleave(given.shape[0] // mine.shape[0], 0)
        return torch.equal(mine.to(given.device, given.dtype), given[:, : mine.shape[1]])

    def may_begin(self, call: dict[str, Any], *, is_told: bool) -> bool:
        """Return whether a pass reads this from its start: for the first time, or all of it again.

        Without a cache everything is read again with what is new. ``is_told`` is whether it can be
        seen that nothing came before.
        """
        num_more = shape_of(call)[1] - self.num_read
        is_more = num_more > 0 or not self.num_passes or (is_told and num_more == 0)
        return is_more and self.has_next(call, 0)

    def agrees(self, seen: Seen) -> bool:
        """Return whether a length that can be seen is what was counted, as far as it matters.

        Past the prompt it may be less: assisted decoding takes tokens back.
        """
        if not seen.is_exact:
            return self.num_read > 0
        return min(self.num_read, self.prompt_length) <= seen.tokens <= self.num_read


@dataclass(slots=True, eq=False)
class Place:
    """Where the tokens of one forward pass stand."""

    length: int
    """Tokens of the pass."""
    past: int = 0
    """Tokens before them."""
    branch: Branch | None = None
    """What they belong to, in a ``generate``."""
    is_aside: bool = False
    """Somebody else's pass over what a branch holds in a cache; it is not counted."""
    is_decoding: bool = False
    """All of them are past the prompt, so none is edited."""
    problem: str | None = None
    """Why this cannot be told; an error where an adapter edits."""
    caches: list[Any] = field(default_factory=list)
    """Those among the arguments."""
    keeps_state: bool = True
    """What it returns may be given to the next pass."""

    def passed(self, output: Any) -> None:
        """Count the pass once the model has returned its output."""
        if self.is_aside:
            return
        parts = output.values() if isinstance(output, dict) else output
        parts = list(parts) if isinstance(output, dict | tuple) else []
        if self.branch is not None:
            returned = caches_in(parts) or self.caches
            if not returned and self.keeps_state:
                returned = states_in(parts)
            self.branch.num_read = self.past + self.length
            self.branch.num_passes += 1
            self.branch.caches = [*self.caches, *returned]
        elif self.problem is None:
            for cache in [*self.caches, *caches_in(parts)]:
                if tokens_in(cache) == Seen(1, False):
                    _READ_BY_HAND[cache] = self.past + self.length


class Generation:
    """The branches of one running ``generate``.

    Args:
        branches: The prompt's own first. Classifier-free guidance steers away from another one,
            which transformers runs through the same model.
    """

    def __init__(self, *branches: Branch) -> None:
        self.branches = branches
        self.thread = threading.get_ident()
        self.first_position = 0
        """Of the prompt; callers may count from elsewhere."""

    def place(self, call: dict[str, Any]) -> Place:
        """Return where the tokens of the next pass stand, by its arguments by name."""
        place, seen, by_mask = _look(call, tokens_in)
        if place.problem is not None:
            return place
        place.keeps_state = call.get("use_cache") is not False
        if seen is None:  # no cache that tells
            seen = by_mask or self._by_position(call)
        given = place.caches or states_in(_further(call))
        held = next((b for b in self.branches if _share(b.caches, given)), None)
        if held is not None:
            self._go_on(place, held, seen)
        elif seen is None or seen.tokens == 0:
            self._start(place, call, is_told=seen is not None)
        elif not self.branches[0].num_passes:  # a cache of the caller
            if seen.is_exact and self.branches[0].has_next(call, seen.tokens):
                _put(place, self.branches[0], seen.tokens)
            else:
                place.problem = _other_tokens()
        else:  # the model keeps its cache where it cannot be seen
            candidates = [b for b in self.branches if b.num_passes and b.agrees(seen)]
            longest = max(branch.prompt_length for branch in self.branches)
            if len(candidates) == 1 and not place.caches:
                self._go_on(place, candidates[0], seen)
            elif place.caches and place.length == 1 and seen.is_exact and seen.tokens >= longest:
                place.is_decoding = True  # in a copy of a cache, past every prompt
            else:
                place.problem = _untold(f"{seen.tokens} tokens behind it that were not counted")
        return place

    def _by_position(self, call: dict[str, Any]) -> Seen | None:
        """Return how many tokens came before a pass's first one, by its position.

        transformers from 5.20 on leaves out a mask that masks nothing.
        """
        positions = call.get("position_ids")
        if call.get("attention_mask") is not None or not isinstance(positions, Tensor):
            return None
        first = set(positions[:, 0].tolist()) if positions.ndim == 2 else set()
        if len(first) != 1:
            return None
        if not self.branches[0].num_passes:
            self.first_position = min(first)
        return Seen(max(0, min(first) - self.first_position), True)

    def _go_on(self, place: Place, branch: Branch, seen: Seen | None) -> None:
        """Place a pass that goes on with a branch, if what can be seen agrees with the count."""
        if seen is None or branch.agrees(seen):
            _put(place, branch, seen.tokens if seen and seen.is_exact else branch.num_read)
        else:
            place.problem = (
                f"{branch.num_read} tokens were read and the cache holds {seen.tokens} "
                f"({_versions()}), so the prompt cannot be told from the answer; {_REMEDY}"
            )

    def _start(self, place: Place, call: dict[str, Any], *, is_told: bool) -> None:
        """Place a pass without a past: the first of a branch, or all of it read once more."""
        first = self.branches[0]
        if not first.inputs:
            _take_as_prompt(first, call)
        # The prompt's own branch is read to the end of the prompt, then they take turns.
        is_first = first.num_read < first.prompt_length
        branches = self.branches[:1] if is_first else self.branches
        found = [branch for branch in branches if branch.may_begin(call, is_told=is_told)]
        branch = min(found, key=lambda each: each.num_passes, default=None)
        if branch is not None and (
            is_told or not branch.num_passes or place.length >= branch.prompt_length
        ):
            _put(place, branch, 0)
            place.is_aside = bool(branch.caches)
        elif is_told or not first.num_passes:
            place.problem = _other_tokens()
        else:
            place.problem = _untold("neither a cache nor an attention mask")


def place_by_hand(call: dict[str, Any], *, training: bool) -> Place:
    """Return where the tokens of a pass outside of ``generate`` stand, by its cache.

    ``training``, where gradients will be taken, needs none.
    """
    if call.get(_input_name(call)) is None:
        return Place(0)  # a model of something else than tokens
    place, seen, by_mask = _look(call, _read_by_hand)
    if place.problem is not None:
        return place
    if seen is None:
        seen = by_mask
        may_be_cache = place.caches or (not training and states_in(_further(call)))
        # One token under a mask of its own may follow others: some models read no mask.
        if may_be_cache and (seen is None or (not seen.tokens and place.length == 1)):
            place.problem = _untold("an argument that may be a cache, but not its length")
            return place
    if seen is not None and not seen.tokens and by_mask is not None and by_mask.tokens:
        place.problem = _untold(f"an empty cache and a mask of {by_mask.tokens} tokens before")
    elif seen is not None and seen.tokens:
        place.past = seen.tokens
        # After a single token the next may be the answer's or, token by token, the prompt's.
        is_next = place.length == 1 and seen != Seen(1, True)
        if is_next and call.get("prompt_mask") is None:
            place.is_decoding = True
        else:
            place.problem = (
                f"a pass over tokens that follow {seen.tokens} in a cache ({place.length} here) "
                "may read more of the prompt or of the answer, which cannot be told; "
                f"{_REMEDY}"
            )
    return place


def _look(
    call: dict[str, Any], length_of: Callable[[Any], Seen | None]
) -> tuple[Place, Seen | None, Seen | None]:
    """Return a pass that is not placed yet, and what its caches and its mask say came before."""
    place = Place(shape_of(call)[1], caches=caches_in(call.values()))
    lengths = {length_of(cache) for cache in place.caches}
    if len(lengths) > 1:
        place.problem = _untold("caches of different lengths")
    mask = call.get("attention_mask")
    by_mask = None
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= place.length:
        by_mask = Seen(int(mask.shape[1]) - place.length, True)
    return place, next(iter(lengths)) if len(lengths) == 1 else None, by_mask


# How many tokens a state holds that was read outside of ``generate`` and does not count them.
_READ_BY_HAND: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def _read_by_hand(cache: Any) -> Seen | None:
    seen = tokens_in(cache)
    if seen is None or seen.is_exact:
        return seen
    counted = _READ_BY_HAND.get(cache)
    return None if counted is None else Seen(counted, True)


def shape_of(call: dict[str, Any]) -> tuple[int, int]:
    """Return (batch, length) of a forward pass by its arguments.

    Raises:
        InputError: It has no tokens.
    """
    inputs = call.get(_input_name(call))
    if inputs is None:
        raise InputError(
            "input_ids must be given (or inputs_embeds), got neither; pass one of them"
        )
    return int(inputs.shape[0]), int(inputs.shape[1])


def _input_name(call: dict[str, Any]) -> str:
    return "input_ids" if call.get("input_ids") is not None else "inputs_embeds"


def _put(place: Place, branch: Branch, past: int) -> None:
    place.past, place.branch = past, branch
    place.is_decoding = past >= branch.prompt_length


def _take_as_prompt(branch: Branch, call: dict[str, Any]) -> None:
    """Take what a pass reads as the prompt, which ``generate`` was not given."""
    name, mask = _input_name(call), call.get("attention_mask")
    branch.inputs = {name: call[name]}
    is_plain = isinstance(mask, Tensor) and mask.shape == call[name].shape[:2]
    branch.mask = mask if is_plain else torch.ones(call[name].shape[:2], dtype=torch.long)


def _further(call: dict[str, Any]) -> list[Any]:
    """Return the arguments that may be a state of a kind that is not known."""
    return [value for name, value in call.items() if name not in _NO_CACHE]


def _share(caches: list[Any], others: list[Any]) -> bool:
    return any(one is other for one in caches for other in others)


def _other_tokens() -> str:
    return (
        f"generate reads other tokens first than the prompt that it was given ({_versions()}), so "
        f"which ones to edit cannot be told; {_REMEDY}"
    )


def _untold(what: str) -> str:
    return (
        f"what came before this forward pass cannot be told: it has {what} ({_versions()}), so new "
        f"tokens might be edited; {_REMEDY}"
    )


def _versions() -> str:
    return f"{installed('transformers')}, {installed('peft')}"
