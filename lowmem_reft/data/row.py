"""One row: what it holds, and how it is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.chats import answer_text, checked_text, is_trained
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.data.formats import Record


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checked row; the fields that its kind lacks are empty."""

    source: str
    """Where it was read: ``file:line``, or ``file, row n`` where there are no lines."""
    prompt: str = ""
    """The prompt without template, or the text of a row with ``text``; empty for chats."""
    text_pair: str | None = None
    """The second text of a sentence pair."""
    before: str = ""
    """What stands before the prompt as its template writes it: solved examples."""
    messages: tuple[dict[str, Any], ...] = ()
    """The whole chat, the response included."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What else the chat template is given: tools, documents, chat_template_kwargs."""
    response: str | None = None
    """What is trained on: response, right choice, label or last assistant message."""
    choices: tuple[str, ...] = ()
    """The texts to choose from."""
    answer: int | None = None
    """Index of the right choice."""
    label: str | None = None
    """Class name; integer classes are written in digits."""
    target: float | None = None
    """The number to predict, in regression or beside choices that stand for numbers."""

    @property
    def kind(self) -> str:
        """One of messages, choices, label, target, response, prompt (no response to train on)."""
        kinds = ("messages", "choices", "label", "target", "response")
        return next((kind for kind in kinds if getattr(self, kind) not in (None, ())), "prompt")

    @property
    def prompt_messages(self) -> list[dict[str, Any]]:
        """The chat without the response."""
        return list(self.messages if self.response is None else self.messages[:-1])


def checked_row(record: Record, where: str, *, require_response: bool) -> Row:
    """Check the content of a record and build its row.

    Raises:
        InputError: Something in it is wrong; the message names the place.
    """
    content = record.content
    if record.kind == "messages":
        row = _chat_row(content["messages"], where, require_response=require_response)
        return replace(row, template_arguments=record.template_arguments)
    if record.kind in ("label", "target"):
        return _text_row(content, record.kind, where)
    if record.kind == "choices":
        return _choice_row(content, where)
    return Row(source=where, prompt=content["prompt"], response=content.get("response"))


def as_chat(row: Row, record: Record) -> Row:
    """Return a prompt and its response as a chat, after its system message and history."""
    messages = [*record.history, *one_turn(row).messages]
    if record.system is not None:
        messages.insert(0, {"role": "system", "content": record.system})
    return Row(
        source=row.source,
        messages=tuple(messages),
        response=row.response,
        template_arguments=record.template_arguments,
    )


def one_turn(row: Row) -> Row:
    """Return a row whose prompt is the user's message of a chat, and its response the answer."""
    messages = [{"role": "user", "content": row.prompt}]
    if row.response is not None:
        messages.append(answer_of(row.response))
    return replace(row, prompt="", messages=tuple(messages))


def answer_of(text: str) -> dict[str, str]:
    """Return a text as the assistant's message."""
    return {"role": "assistant", "content": text}


def _text_row(record: dict[str, Any], kind: str, where: str) -> Row:
    text, pair = checked_text(record["text"], "text", where), record["text_pair"] or None
    pair = None if pair is None else checked_text(pair, "text_pair", where)
    row = Row(source=where, prompt=text, text_pair=pair)
    if kind == "target":
        return replace(row, target=_target(record["target"], where))
    label = _whole(record["label"])
    label = str(label) if type(label) is int else label
    label = checked_text(label, "label", where, "a non-empty string or an integer")
    return replace(row, response=label, label=label)


def _whole(value: Any) -> Any:
    """An integer that is a float because a cell of its column was empty."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _target(value: Any, where: str) -> float:
    """The number in a cell; in a CSV file it is text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{where}: target must be a number, got {shortened(value)}; correct or remove the row"
        )
    return number


def _choice_row(record: dict[str, Any], where: str) -> Row:
    prompt = checked_text(record["prompt"], "prompt", where)
    choices, answer, target = record["choices"], _whole(record["answer"]), record["target"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(
            f"{where}: choices must be a list of two or more texts, got {shortened(choices)}; "
            "correct the row"
        )
    texts = [checked_text(choice, f"choices[{i}]", where) for i, choice in enumerate(choices)]
    check_different(texts, "choices", where)
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise InputError(
            f"{where}: answer must be an integer from 0 to {len(texts) - 1}, got {answer!r}; "
            "give the index of the right choice"
        )
    return Row(
        source=where,
        prompt=prompt,
        response=texts[answer],
        choices=tuple(texts),
        answer=answer,
        # The cell of a CSV file is empty where there is none.
        target=None if target in (None, "") else _target(target, where),
    )


def check_different(texts: Sequence[str], name: str, where: str) -> None:
    """Refuse texts that are equal but for the spaces around them: only one could be right.

    Raises:
        InputError: There are two such; the message names the place and ``name``.
    """
    seen: dict[str, str] = {}
    for text in texts:
        if text.strip() in seen:
            raise InputError(
                f"{where}: {name} must be different, got {shortened(seen[text.strip()])} and "
                f"{shortened(text)}; make them one"
            )
        seen[text.strip()] = text


def _chat_row(messages: list[dict[str, Any]], where: str, *, require_response: bool) -> Row:
    if require_response:
        messages = _until_trained(messages, where)
    role = messages[-1]["role"]
    if role == "assistant" and len(messages) < 2:
        raise InputError(
            f"{where}: messages must have a prompt before the response, got one; add the prompt"
        )
    if role != "assistant" and require_response:
        raise InputError(
            f"{where}: the last message must be the assistant's, got {role!r}; add the response"
        )
    return Row(
        source=where,
        messages=tuple(messages),
        response=answer_text(messages[-1]) if role == "assistant" else None,
    )


def _until_trained(messages: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The chat up to its last message that may be trained, where those after it say they may not.

    Raises:
        InputError: No message of the assistant may be trained.
    """
    if messages[-1]["role"] != "assistant" or is_trained(messages[-1]):
        return messages
    trained = [
        i for i, turn in enumerate(messages) if turn["role"] == "assistant" and is_trained(turn)
    ]
    if not trained:
        raise InputError(
            f"{where}: messages must have one of the assistant's to train, got weight 0 or train "
            "false in all; remove the row"
        )
    return messages[: trained[-1] + 1]
