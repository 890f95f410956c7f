"""Records as other tools write them become records with the columns of ``rows``.

The first that fits: a record that has the columns of ``rows`` already; a chat named
``conversations`` or ``conversation`` (ShareGPT); ``question, choices, answer``; and a prompt and a
response under other names (Alpaca, Dolly, TRL, question and answer). What a record has besides is
given to the chat template or named by ``rows`` as ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any

from lowmem_reft.data.chats import chat_messages, checked_text, tool_list, without_nulls
from lowmem_reft.data.columns import (
    CHATS,
    FOR_TEMPLATES,
    KINDS,
    PROMPTS,
    RESPONSES,
    SYSTEMS,
    TOGETHER,
)
from lowmem_reft.data.text import parse_json
from lowmem_reft.errors import InputError

_FURTHER = {
    "choices": ("target",),
    "label": ("text_pair", "target"),
    "target": ("text_pair", "label"),
}
_HOW_APPLIED = (
    "conversation",
    "chat_template",
    "tokenize",
    "add_generation_prompt",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record with the columns of ``rows``, and what it came from."""

    kind: str
    """A key of ``columns.KINDS``, or ``prompt``: one that is still to be answered."""
    content: dict[str, Any]
    """The columns of its kind; a prompt and a response are texts, a chat is checked messages."""
    system: str | None = None
    """A system message for a prompt that is not a chat's."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Messages before such a prompt."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """What a chat template is given besides."""
    used: tuple[str, ...] = ()
    """Columns that the record was made of."""
    left_out: tuple[str, ...] = ()
    """Columns that hold something and are not read."""


def understood(record: dict[Any, Any], where: str, *, require_response: bool) -> Record | None:
    """Return what a record means; None if it has not the columns of any kind.

    Args:
        record: The columns; a null is a missing one.
        where: The row's place, for messages of errors.
        require_response: False also takes what is still to be answered.

    Raises:
        InputError: It has the columns of several kinds, or a column is wrong.
    """
    present = {name: value for name, value in record.items() if value is not None}
    kinds = [kind for kind, names in KINDS.items() if present.keys() >= set(names)]
    if len(kinds) > 1:
        every = "; ".join(" + ".join(KINDS[kind]) for kind in kinds)
        raise InputError(
            f"{where}: a row must fit only one of: {every}, got {sorted(map(str, present))}; "
            "rename or remove columns"
        )
    kind = kinds[0] if kinds else None
    chat = next((name for name in CHATS if name in present), None)
    if kind is None and chat is not None:
        kind = "messages"
    if kind == "messages":
        return _chat(present, str(chat), where)
    if kind in ("label", "target"):
        used = (*KINDS[kind], *_FURTHER[kind])
        return _record(kind, present, {name: present.get(name) for name in used}, used)
    prompt = next((name for name in PROMPTS if name in present), None)
    if prompt is not None and kind in (None, "choices") and {"choices", "answer"} <= {*present}:
        used = (prompt, "choices", "answer", "target")
        content = {name: present.get(name) for name in used} | {"prompt": present[prompt]}
        return _record("choices", present, content, used)
    if not require_response:  # empty where it is still to be written
        present = {name: v for name, v in present.items() if v != "" or name not in RESPONSES}
    response = next((name for name in RESPONSES if name in present), None)
    if prompt is None or prompt == response or (require_response and response is None):
        return None
    return _prompted(present, prompt, response, where)


def _record(
    kind: str, present: dict[Any, Any], content: dict[str, Any], used: tuple[str, ...], **more: Any
) -> Record:
    left_out = tuple(
        str(name) or "one without a name"
        for name, value in present.items()
        if name not in used and value not in ("", [], {})
    )
    used = tuple(name for name in used if name in present)
    return Record(kind=kind, content=content, used=used, left_out=left_out, **more)


def _chat(present: dict[Any, Any], name: str, where: str) -> Record:
    messages = chat_messages(_parsed(present[name], name, where), where, name)
    system, system_name = _system(present, where)
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    elif system is not None and messages[0]["content"] != system:
        raise InputError(
            f"{where}: {system_name} must be the chat's only system message, got "
            f"{shortened(messages[0]['content'])} in the chat; remove one of them"
        )
    used = (name, *SYSTEMS, *FOR_TEMPLATES)
    arguments = _arguments(present, where)
    return _record("messages", present, {"messages": messages}, used, template_arguments=arguments)


def _prompted(present: dict[Any, Any], prompt: str, response: str | None, where: str) -> Record:
    """A prompt, and a response if it has one, whatever they are called."""
    further = next((name for name in TOGETHER.get(prompt, ()) if present.get(name)), None)
    used = tuple(filter(None, (prompt, further, response)))
    asked, answer = present[prompt], None if response is None else present[response]
    if isinstance(asked, list) or isinstance(answer, list):
        messages = [*_as_messages(asked, "user", prompt, where)]
        if response is not None:
            messages += _as_messages(answer, "assistant", response, where)
        others = {name: value for name, value in present.items() if name not in used}
        chat = _chat({**others, "messages": messages}, "messages", where)
        return _record(
            "messages",
            present,
            chat.content,
            (*used, *SYSTEMS, *FOR_TEMPLATES),
            template_arguments=chat.template_arguments,
        )
    text = checked_text(asked, prompt, where)
    if further is not None:
        text = f"{text}\n{checked_text(present[further], further, where)}"
    content = {"prompt": text}
    if response is not None:
        content["response"] = checked_text(answer, response, where)
    system, history = _system(present, where)[0], _history(present.get("history"), where)
    is_chat = system is not None or bool(history)
    arguments = _arguments(present, where) if is_chat else {}
    used += (*SYSTEMS, "history", *(FOR_TEMPLATES if is_chat else ()))
    return _record(
        "prompt" if response is None else "response",
        present,
        content,
        used,
        system=system,
        history=history,
        template_arguments=arguments,
    )


def _as_messages(value: Any, role: str, name: str, where: str) -> list[dict[str, Any]]:
    if isinstance(value, list):
        return chat_messages(value, where, name)
    return [{"role": role, "content": checked_text(value, name, where)}]


def _system(present: dict[Any, Any], where: str) -> tuple[str | None, str]:
    """The system message and its column's name; an empty one is none."""
    name = next((name for name in SYSTEMS if present.get(name) not in (None, "")), "system")
    value = present.get(name) or None
    return None if value is None else checked_text(value, name, where), name


def _history(history: Any, where: str) -> list[dict[str, Any]]:
    """The turns before a prompt: pairs of question and answer, or messages."""
    history = _parsed(history, "history", where) if history else None
    if not history:
        return []
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return chat_messages(history, where, "history")
    messages = []
    for number, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(
                f"{where}: history must be a list of [question, answer] pairs, got "
                f"{shortened(pair)}; correct the row"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = checked_text(text, f"history[{number}]", where)
            messages.append({"role": role, "content": content})
    return messages


def _arguments(present: dict[Any, Any], where: str) -> dict[str, Any]:
    """What the chat template is given besides the messages."""
    given = _parsed(present.get("chat_template_kwargs") or {}, "chat_template_kwargs", where)
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise InputError(
            f"{where}: chat_template_kwargs must be an object, got {shortened(given)}; "
            "correct the row"
        )
    arguments: dict[str, Any] = without_nulls(given, "chat_template_kwargs", where)
    for name in arguments:
        if name in _HOW_APPLIED or name.startswith(("return_", "tokenizer_")):
            raise InputError(
                f"{where}: chat_template_kwargs must be for the template, got {name!r}, which "
                "says how it is applied; remove it"
            )
    for name, checked in (("tools", tool_list), ("documents", _documents)):
        column, inside = present.get(name) or None, arguments.pop(name, None) or None
        if column is not None and inside is not None:
            raise InputError(
                f"{where}: {name} must be given once, got a column and one in "
                "chat_template_kwargs; remove one"
            )
        value = checked(without_nulls(column or inside or [], name, where), where)
        if value:
            arguments[name] = value
    return arguments


def _documents(documents: Any, where: str) -> list[Any]:
    given = _parsed(documents, "documents", where)
    if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
        raise InputError(
            f"{where}: documents must be a list of objects, got {shortened(given)}; correct the row"
        )
    return given


def _parsed(value: Any, name: str, where: str) -> Any:
    return parse_json(value, f"{where}: {name}") if isinstance(value, str) else value
