"""What a base has no place for: tokens beyond its embeddings, and more tokens than positions.

Both would be an index out of range in the middle of a run, on CUDA without a word about which, or,
with rotary positions, a base that runs on where it was never trained. They are refused before.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.heads import from_config
from lowmem_reft.errors import InputError

logger = logging.getLogger(__name__)

_CHOSEN_FREELY = 10**12
"""Tokenizers that know no length say that it is above this."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The tokens that a base knows, and how many of them it can tell apart by their place."""

    tokenizer: Any
    """Names the tokens, and may know a length of its own."""
    num_tokens: int | None
    """Rows of the embedding; None: not known."""
    num_positions: int | None
    """Most tokens of an example; None: any number."""

    @classmethod
    def of(cls, base: Any, tokenizer: Any, *, task_type: str = "CAUSAL_LM") -> Limits:
        """Find the limits of a model with or without an adapter, or of a configuration."""
        base = base_of(base)
        config = base.config if isinstance(base, nn.Module) else base
        return cls(
            tokenizer=tokenizer,
            num_tokens=vocabulary_size(config),
            num_positions=_num_positions(base, config, task_type),
        )

    def check(
        self,
        sources: Sequence[str],
        examples: Sequence[Sequence[int]],
        *,
        virtual: int = 0,
        new: int = 0,
        cut: bool = False,
    ) -> None:
        """Refuse examples with a token that has no embedding, or with too many tokens.

        Args:
            sources: Where each example is from: file and line.
            examples: The token ids of each.
            virtual: Trained tokens that a method puts before each.
            new: Tokens to be generated after each. The last of them is not read.
            cut: Too many tokens will be cut, and only unknown ones are refused.

        Raises:
            InputError: There are some; the message names the first and the token.
        """
        self._check_tokens(sources, examples)
        if cut:
            return
        room = self.room(virtual=virtual, new=new)
        longest = max(map(len, examples), default=0)
        if room is None:
            room = longest
        beyond = [i for i, ids in enumerate(examples) if len(ids) > room]
        if beyond:
            raise InputError(self._too_long(sources, examples, beyond, virtual, new))
        own = getattr(self.tokenizer, "model_max_length", None) or _CHOSEN_FREELY
        if own < longest + virtual + max(new - 1, 0):
            logger.warning(
                "the longest example has %s tokens%s, more than the %s that the tokenizer gives as "
                "its model_max_length",
                longest,
                _added(virtual, new),
                own,
            )

    def room(self, *, virtual: int = 0, new: int = 0) -> int | None:
        """Return how many tokens an example may have beside others; None: any number."""
        if self.num_positions is None:
            return None
        return self.num_positions - virtual - max(new - 1, 0)

    def _check_tokens(self, sources: Sequence[str], examples: Sequence[Sequence[int]]) -> None:
        size = self.num_tokens
        if size is None:
            return
        beyond = [i for i, ids in enumerate(examples) if ids and max(ids) >= size]
        if beyond:
            first = next(token for token in examples[beyond[0]] if token >= size)
            text = self.tokenizer.convert_ids_to_tokens(first)
            raise InputError(
                f"{sources[beyond[0]]}: tokens must be among the {size} that the base has "
                f"embeddings for, got {text!r} with id {first}{_more(sources, beyond)}; resize the "
                "base's embeddings for this tokenizer and save it, or take the token out"
            )

    def _too_long(
        self,
        sources: Sequence[str],
        examples: Sequence[Sequence[int]],
        beyond: Sequence[int],
        virtual: int,
        new: int,
    ) -> str:
        ids, room = examples[beyond[0]], self.room(virtual=virtual, new=new)
        assert room is not None
        got = f"{len(ids)}{_added(virtual, new)}"
        if 0 < room < len(ids):
            text = self.tokenizer.convert_ids_to_tokens(ids[room])
            got += f" (the first without a place is token {room + 1}, {text!r})"
        helps = f"give --max-length {room}, which cuts prompts from the left"
        if room < 2:
            helps = "generate fewer tokens" if new else "use fewer virtual tokens"
        elif new:
            helps += ", or lower --max-new-tokens"
        return (
            f"{sources[beyond[0]]}: tokens must fit the {self.num_positions} positions of the "
            f"base, got {got}{_more(sources, beyond)}; {helps}, or raise max_position_embeddings "
            "in the config.json of a base that can do more"
        )


def _added(virtual: int, new: int) -> str:
    parts = ((virtual, "virtual ones"), (new, "to generate"))
    return "".join(f" and {number} {what}" for number, what in parts if number)


def _more(sources: Sequence[str], beyond: Sequence[int]) -> str:
    others = {sources[index] for index in beyond} - {sources[beyond[0]]}
    return f"; so it is in {len(others)} more rows" if others else ""


def vocabulary_size(config: Any) -> int | None:
    """Return how many tokens a base has embeddings for; None if its configuration does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def pad_with_known_token(tokenizer: Any, config: Any) -> None:
    """Let a tokenizer pad with a token that the base has, where its own has no embedding.

    Padding is masked, so any token will do; only one that ends texts, or is special, is told from
    what stands before it by a decoder's classifier.

    Raises:
        InputError: No special token of the tokenizer has an embedding.
    """
    size = vocabulary_size(config)
    if size is None or tokenizer.pad_token_id is None or tokenizer.pad_token_id < size:
        return
    for name in ("eos_token", "unk_token", "bos_token", "cls_token", "sep_token"):
        token = getattr(tokenizer, name, None)
        if token is not None and tokenizer.convert_tokens_to_ids(token) < size:
            tokenizer.pad_token = token
            return
    raise InputError(
        f"pad_token must be among the {size} tokens that the base has embeddings for, got "
        f"{tokenizer.pad_token!r} with id {tokenizer.pad_token_id}; resize the base's embeddings "
        "for this tokenizer and save it"
    )


def _num_positions(base: Any, config: Any, task_type: str) -> int | None:
    """Return how many positions a base has: of its tables, or that its rotations were made for."""
    text = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None)
    if rotary:
        return _rotary_positions(rotary, getattr(text, "max_position_embeddings", None))
    if not isinstance(base, nn.Module):
        with torch.device("meta"):
            base = from_config(copy.deepcopy(config), task_type)
    sizes = [*_table_sizes(base)]
    if getattr(text, "max_seq_len", None):  # MPT makes its biases for as many
        sizes.append(text.max_seq_len)
    return min(sizes, default=None)


def _rotary_positions(rotary: Any, stated: Any) -> int | None:
    """Return the positions of a base that rotates; scaled, it has as many as the scaling makes.

    Sliding and full attention may be scaled differently. ``dynamic`` scales with the length.
    """
    if not isinstance(stated, int) or stated < 1:
        return None
    kinds = [rotary] if "rope_type" in rotary else [v for v in rotary.values() if v]
    found = [stated]
    for kind in kinds:
        if kind.get("rope_type") == "dynamic":
            return None
        factor = kind.get("factor") or 1.0
        found.append(int(factor * (kind.get("original_max_position_embeddings") or stated)))
    return max(found)


def _table_sizes(base: nn.Module) -> Iterator[int]:
    """Yield how many tokens the tables of learned or fixed positions in a base are for.

    Some begin behind the padding's index (RoBERTa) or at an offset (OPT).
    """
    for name, module in base.named_modules():
        if not _is_of_positions(name.rpartition(".")[2]):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            padding = getattr(module, "padding_idx", None)
            offset = int(getattr(module, "offset", 0)) if padding is None else padding + 1
            yield weight.shape[0] - offset
    for name, buffer in base.named_buffers():  # GPT-J rotates by a table
        if name.rpartition(".")[2] == "embed_positions" and buffer.ndim == 2:
            yield buffer.shape[0]


def _is_of_positions(name: str) -> bool:
    return name in ("wpe", "position_embeddings", "embed_positions", "positions_embed")
