"""Where a prompt ends and a response begins, in tokens: decided here for all who read rows.

The prompt's tokens are those of its text alone, whatever follows. The whole text is tokenized too;
if the tokenizer merges across the joint, so that the prompt's tokens do not begin it, the response
is tokenized by itself, and what both decode to must be the whole text. This needs no character
offsets, which slow tokenizers lack and byte-level ones trim at white space.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from lowmem_reft.data.templates import encode
from lowmem_reft.errors import InputError
from lowmem_reft.machine.progress import progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from lowmem_reft.data.rows import Row

TEXTS_AT_ONCE = 8192
"""Texts that are tokenized together; with more there is a progress bar."""


def tokenized(
    rows: Sequence[Row],
    texts: Sequence[tuple[str, list[str]]],
    tokenizer: PreTrainedTokenizerBase,
    bos: list[int] | None = None,
) -> list[tuple[list[int], list[list[int]]]]:
    """Prompt, with BOS, and responses of every row: those of a row share the prompt's tokens."""
    sources = list(dict.fromkeys([row.source for row in (*rows[:1], *rows[-1:])]))
    source = " to ".join(sources)
    prompts = _tokenize([prompt for prompt, _ in texts], tokenizer, source)
    joined = [prompt + rest for prompt, responses in texts for rest in responses]
    wholes = iter(_tokenize(joined, tokenizer, source))
    bos = bos_of(tokenizer) if bos is None else bos
    found = []
    for row, (_, responses), prompt_ids in zip(rows, texts, prompts, strict=True):
        ids = [_after(row, prompt_ids, rest, next(wholes), tokenizer) for rest in responses]
        # Chat templates write their own BOS or none.
        head = [] if row.messages or prompt_ids[:1] == bos else bos
        found.append((head + prompt_ids, ids))
    return found


def with_end(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Whether the response of each row has EOS: of choices only where one begins another.

    That is told by the tokens of the choices alone, so that it is the same in training, where the
    other choices are not written after the prompt.
    """
    known: dict[tuple[str, ...], bool] = {(): True}
    for row in rows:
        if row.choices not in known:
            alone = _tokenize(
                [f" {choice.strip()}" for choice in row.choices], tokenizer, row.source
            )
            known[row.choices] = one_begins_another(alone)
    return [known[row.choices] for row in rows]


def one_begins_another(responses: list[list[int]]) -> bool:
    """Whether the tokens of one response begin, or are, those of another."""
    ordered = sorted(responses)  # what begins another stands right before what it begins
    return any(b[: len(a)] == a for a, b in pairwise(ordered))


def end_response(row: Row, response: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a response end with EOS, if the tokenizer has one.

    Raises:
        InputError: It has none, and a choice that begins another needs it.
    """
    eos_id = tokenizer.eos_token_id
    if eos_id is None and row.choices:
        raise InputError(
            f"{row.source}: no choice may begin another where the tokenizer has no eos_token, got "
            f"{list(row.choices)}; write them otherwise"
        )
    if eos_id is not None and response[-1:] != [eos_id]:
        response.append(eos_id)


def _after(
    row: Row,
    prompt: list[int],
    rest: str,
    whole: list[int],
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """Return the tokens of a response after the prompt's, which it does not change.

    Raises:
        InputError: There are none, or the tokenizer merges across the joint for good.
    """
    size = len(prompt)
    found = whole[size:] if whole[:size] == prompt else None
    if found is None:
        text = tokenizer.decode(whole)
        # After nothing, or after what is a token of its own: not all tokenizers begin a text as
        # they go on.
        for before in ("", "\n", ":", "a"):
            start, ids = _tokenize([before, before + rest], tokenizer, row.source)
            if ids[: len(start)] == start and tokenizer.decode(prompt + ids[len(start) :]) == text:
                found = ids[len(start) :]
                break
        else:
            shared = next(i for i, (a, b) in enumerate(zip(prompt, [*whole, -1])) if a != b)  # noqa: B905
            raise InputError(
                f"{row.source}: the tokenizer must not merge prompt and response, got "
                f"{tokenizer.convert_ids_to_tokens(prompt[shared:])} for the prompt's end and "
                f"{tokenizer.convert_ids_to_tokens(whole[shared : shared + 3])} with the response; "
                "end the prompt, or begin the response, with white space"
            )
    if not found:
        raise InputError(
            f"{row.source}: response must have tokens, got none from this tokenizer; "
            "use a model that knows its characters"
        )
    return found


def _tokenize(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, source: str
) -> list[list[int]]:
    """Token ids without special tokens, so that an EOS of the tokenizer's own is never there."""
    ids: list[list[int]] = []
    starts = range(0, len(texts), TEXTS_AT_ONCE)
    for start in progress(starts, "tokenizing", quiet=len(starts) < 2):
        part = list(texts[start : start + TEXTS_AT_ONCE])
        found = encode(tokenizer, part, source=source, add_special_tokens=False, verbose=False)
        ids += found["input_ids"]
    return ids


def bos_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer starts texts with one, else []."""
    start: list[int] = tokenizer("")["input_ids"][:1]
    return start if start == [tokenizer.bos_token_id] else []
