"""What stays of a prompt that is too long: its frame, and the end of what is said in it.

The frame is what the template writes around a prompt, and the system message of a chat. The oldest
turns of a chat give way first; then the text of the one that is left, or of the prompt, is cut from
the left. What the frame leaves no room for is not cut: a model never sees half a frame.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lowmem_reft.data.templates import encode
from lowmem_reft.data.texts import num_shared, written

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedTokenizerBase

    from lowmem_reft.data.row import Row

_OF_SYSTEM = ("system", "developer")


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
