"""What stays of a prompt that is too long: its frame, and the end of what is said in it.

The frame is what the template writes around a prompt, and the system message of a chat. The oldest
turns of a chat give way first; then the text of the one that is left, or of the prompt, is cut from
the left. What the frame leaves no room for is not cut: a model never sees half a frame. With
``long_rows`` ``drop`` nothing is cut, and what is too long is left out.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from lowmem_reft.data.templates import encode
from lowmem_reft.data.texts import num_shared, written
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from lowmem_reft.data.row import Row
    from lowmem_reft.options import LongRows

Encoded = TypeVar("Encoded")

_OF_SYSTEM = ("system", "developer")


class RowsTooLongError(InputError):
    """Rows that do not fit: their responses leave no room for a prompt, or nothing is to be cut.

    ``indices`` are theirs among the rows, ``longest`` is the max_length that all would need.
    """

    def __init__(self, message: str, indices: list[int], longest: int) -> None:
        super().__init__(message)
        self.indices, self.longest = indices, longest


def encode_those_that_fit(
    rows: Sequence[Row], encode: Callable[[Sequence[Row]], Encoded], *, long_rows: LongRows
) -> tuple[list[Row], Encoded]:
    """Encode rows; return them with it, without those that are too long if these are to go.

    Raises:
        InputError: Rows are too long and are not to be left out, or no other is left.
    """
    try:
        return list(rows), encode(rows)
    except RowsTooLongError as error:
        wrong = set(error.indices)
        kept = [row for index, row in enumerate(rows) if index not in wrong]
        if long_rows == "cut" or not kept:
            raise
        first = rows[error.indices[0]].source
        warnings.warn(
            f"{len(wrong)} of {len(rows)} rows were left out, the first is {first}: they have more "
            f"tokens than max_length; the longest has {error.longest}",
            stacklevel=2,
        )
        return kept, encode(kept)


def fitted(
    rows: Sequence[Row],
    encoded: Sequence[tuple[list[int], list[list[int]]]],
    num_responses: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    long_rows: LongRows,
) -> list[list[int]]:
    """Return what of each prompt fits beside its response, with the prompt's frame.

    Raises:
        InputError: A prompt has no token, or (``RowsTooLongError``) rows do not fit.
    """
    if long_rows == "drop":
        pairs = zip(encoded, num_responses, strict=True)
        refuse_longer(rows, [len(prompt) + size for (prompt, _), size in pairs], max_length)
    kept, too_long = [], {}
    for index, (row, (prompt, _), size) in enumerate(
        zip(rows, encoded, num_responses, strict=True)
    ):
        if not prompt:
            raise InputError(
                f"{row.source}: prompt must have a token of its own before the response, got none; "
                "make it longer"
            )
        fitting: list[int] | None = prompt
        if len(prompt) + size > max_length:
            fitting, fewest = cut_prompt(row, prompt, max_length - size, tokenizer, template)
            if fitting is None:
                too_long[index] = size, fewest
        kept.append(fitting or prompt)
    if too_long:
        longest = max(map(sum, too_long.values()))
        text = _all_too_long(rows, too_long, max_length, longest)
        raise RowsTooLongError(text, [*too_long], longest)
    return kept


def cut_prompt(
    row: Row, prompt: list[int], size: int, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[list[int] | None, int]:
    """Return at most ``size`` tokens of a prompt, and how few it could have.

    Args:
        row: Whose prompt it is.
        prompt: All its tokens.
        size: Most tokens.
        tokenizer: What made them.
        template: How a prompt that is no chat is written.

    Returns:
        The tokens, or None where the frame and one token more do not fit; and their number.
    """
    for shorter, tokens in _ever_shorter(row, prompt, tokenizer, template):
        row = shorter
        if len(tokens) <= size:
            return tokens, len(tokens)
    frame = _frame(row, tokenizer, template)
    if frame is None:
        return None, len(tokens)
    head, tail = (_ids(text, tokenizer, row.source) for text in frame)
    if tokens[0] == tokenizer.bos_token_id and head[:1] != tokens[:1]:
        head = [tokens[0], *head]
    start = num_shared(head, tokens)
    fewest = start + num_shared(tail[::-1], tokens[start:][::-1]) + 1
    if fewest > size:
        return None, fewest
    return tokens[:start] + tokens[len(tokens) - (size - start) :], fewest


def _ever_shorter(
    row: Row, prompt: list[int], tokenizer: PreTrainedTokenizerBase, template: str
) -> Iterator[tuple[Row, list[int]]]:
    """The row and its prompt's tokens, then without the oldest turns of a chat, one by one."""
    yield row, prompt
    asked = row.prompt_messages
    first = _num_of_system(asked)
    for start in range(first + 1, len(asked)):
        if asked[start]["role"] == "user":
            shorter = replace(row, messages=(*row.messages[:first], *row.messages[start:]))
            text, _ = written(shorter, tokenizer, template=template, joint="none", responses=())
            yield shorter, _ids(text, tokenizer, row.source)


def _frame(row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[str, str] | None:
    """The text before what may be cut, and the one after it; None if that is not found.

    Of a chat, what may be cut is the first message that is not the system's.
    """
    if not row.messages:
        template = template.replace("\\n", "\n")
        head, tail = template.split("{prompt}", 1)[0], template.rsplit("{prompt}", 1)[1]
        # Solved examples stand before a template.
        return "" if row.before else head, tail.rstrip(" ")
    text, _ = written(row, tokenizer, template=template, joint="none", responses=())
    asked = row.prompt_messages
    start = end = 0
    for message in asked[: _num_of_system(asked) + 1]:
        content = message.get("content")
        said = content.strip() if isinstance(content, str) else ""
        start = text.find(said, end)
        if not said or start < 0:
            return None
        end = start + len(said)
    return text[:start], text[end:]


def _num_of_system(messages: Sequence[dict[str, object]]) -> int:
    number = 0
    while number < len(messages) and messages[number]["role"] in _OF_SYSTEM:
        number += 1
    return number


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    arguments = {"add_special_tokens": False, "verbose": False}
    ids: list[int] = encode(tokenizer, [text], source=source, **arguments)["input_ids"][0]
    return ids


def refuse_longer(rows: Sequence[Row], sizes: Sequence[int], max_length: int) -> None:
    """Refuse rows of more tokens than ``max_length``: of which none is to be cut.

    Raises:
        RowsTooLongError: There are such rows.
    """
    wrong = [index for index, size in enumerate(sizes) if size > max_length]
    if wrong:
        longest = max(sizes)
        raise RowsTooLongError(
            f"{rows[wrong[0]].source}: a row must have at most max_length {max_length} tokens with "
            f"--long-rows drop, got {sizes[wrong[0]]}, and {len(wrong)} of {len(rows)} rows have "
            f"more; raise max_length (to {longest} for all), or cut prompts with --long-rows cut",
            wrong,
            longest,
        )


def _all_too_long(
    rows: Sequence[Row], too_long: dict[int, tuple[int, int]], max_length: int, longest: int
) -> str:
    """Name the rows that do not fit, and what would.

    ``too_long`` has the tokens of a row's response and the fewest of its prompt.
    """
    first, *others = too_long
    size, fewest = too_long[first]
    text = (
        f"{rows[first].source}: response must leave room for the prompt in max_length "
        f"{max_length}, got {size} tokens"
    )
    if fewest > 2:  # more than BOS and a token
        text += f", and the prompt needs {fewest} with its template and system message"
    if others:
        named = ", ".join(f"{rows[index].source} ({too_long[index][0]})" for index in others[:3])
        more = ", ..." if len(others) > 3 else ""
        text += f", and {len(others)} more of {len(rows)} rows do not fit: {named}{more}"
    rest = ", shorten the response, or leave such rows out with --long-rows drop" if size else ""
    return f"{text}; raise max_length (to {longest} for all){rest}"
