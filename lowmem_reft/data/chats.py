"""Chats as people have them become chats as chat templates take them.

Read besides ``role`` and ``content``: ShareGPT's ``from`` and ``value``; content as a list of parts
that are all text; calls of tools with null, missing or empty content, which is written ``""``;
calls and their arguments as JSON text; OpenAI's former ``function_call``. A null in a nested object
is a missing key, because Parquet and ``datasets`` give every object the keys of all others; one
that is meant stands in arguments that are JSON text.
"""

from __future__ import annotations

import json
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.text import parse_json
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "function_call",
}
"""Roles by what ``from`` calls them; a ``function_call`` is the assistant's, its value JSON."""

_TRAINED = ("weight", "train", "training")
"""Keys by which other tools say whether an assistant's message is trained."""

_OWN_COLUMNS = ("tools", "documents")
_TEXT_PARTS = ("text", "input_text", "output_text")


def checked_text(value: Any, name: str, where: str, rule: str = "a non-empty string") -> str:
    """Return a text that is not blank and that tokenizers take.

    Raises:
        InputError: It is none; the message names the place and ``name``.
    """
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where}: {name} must be {rule}, got {shortened(value)}; correct or remove the row"
        )
    _check_unicode(value, name, where)
    return value


def without_nulls(value: Any, name: str, where: str) -> Any:
    """Return nested objects and lists without the keys that are null, at any depth.

    Raises:
        InputError: There is something that JSON has not, such as a date of a Parquet file.
    """
    if isinstance(value, dict):
        present = {key: item for key, item in value.items() if item is not None}
        return {key: without_nulls(item, f"{name}.{key}", where) for key, item in present.items()}
    if isinstance(value, list | tuple):
        return [without_nulls(item, f"{name}[{i}]", where) for i, item in enumerate(value)]
    if isinstance(value, str):
        _check_unicode(value, name, where)
    elif value is not None and not isinstance(value, int | float):
        raise InputError(
            f"{where}: {name} must be text, a number, a list or an object, got "
            f"{shortened(value)}; convert it to text"
        )
    return value


def chat_messages(messages: Any, where: str, name: str = "messages") -> list[dict[str, Any]]:
    """Return checked messages with a role and, if only ``""`` beside calls of tools, a content.

    Args:
        messages: What a row has.
        where: The row's place, for messages of errors.
        name: The column, for messages of errors.

    Raises:
        InputError: They are no list of messages, or one of them is wrong; the message names it.
    """
    is_list = isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages)
    if not is_list or not messages:
        raise InputError(
            f"{where}: {name} must be a list of {{role, content}} objects, "
            f"got {shortened(messages)}; correct the row"
        )
    cleaned = without_nulls(messages, name, where)
    return [_message(turn, f"{name}[{i}]", where) for i, turn in enumerate(cleaned)]


def answer_text(message: dict[str, Any]) -> str:
    """Return the text of an assistant's message, and the calls of tools that are part of it."""
    calls = [_shown(call.get("function", call)) for call in message.get("tool_calls", ())]
    return "\n".join(filter(None, [message["content"], *calls]))


def is_trained(message: dict[str, Any]) -> bool:
    """Whether an assistant's message may be trained: nothing in it says ``weight: 0`` or the like.

    ``train: false`` and ``training: false`` say the same.
    """
    return all(message.get(key, 1) for key in _TRAINED)


def tool_list(tools: Any, where: str) -> list[Any]:
    """Return the tools that a chat template is given; they may be JSON text, whole or one by one.

    Raises:
        InputError: They are no list of objects.
    """
    tools = _parsed(tools, "tools", where)
    given = [tools] if isinstance(tools, dict) else tools
    if isinstance(given, list):
        given = [_parsed(tool, f"tools[{i}]", where) for i, tool in enumerate(given)]
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise InputError(
            f"{where}: tools must be a list of objects, got {shortened(tools)}; correct the row"
        )
    return given


def as_column(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages for a file: ``chat_messages`` reads the same from it."""
    return [
        {**message, "tool_calls": [_call_as_read(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def argument_columns(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the columns of a file from which what a chat template is given is read."""
    columns = {name: value for name, value in arguments.items() if name in _OWN_COLUMNS}
    if rest := {name: value for name, value in arguments.items() if name not in columns}:
        columns["chat_template_kwargs"] = rest
    return {name: _kept_nulls(value) for name, value in columns.items()}


def _call_as_read(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": _kept_nulls(function["arguments"])}}


def _kept_nulls(value: Any) -> Any:
    """JSON text where reading would take a null away."""
    return _shown(value) if _has_null(value) else value


def _has_null(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_null, value.values() if isinstance(value, dict) else value))
    return value is None


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _check_unicode(value: str, name: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON lets half of a surrogate pair through; tokenizers do not.
        raise InputError(
            f"{where}: {name} must be valid Unicode, got {error}; correct or remove the row"
        ) from error


def _message(turn: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    message = _renamed(turn, name, where)
    role = checked_text(message.get("role"), f"{name}.role", where)
    content = _joined(message.get("content"), f"{name}.content", where)
    calls = _calls(message, name, where)
    message = {key: value for key, value in message.items() if key != "function_call"}
    if calls:
        message["tool_calls"] = calls
    else:
        message.pop("tool_calls", None)  # an empty list is none
    may_be_empty = calls if role == "assistant" else role in ("tool", "function", "ipython")
    if not (may_be_empty and content in (None, "")):
        content = checked_text(content, f"{name}.content", where)
    if role == "assistant":
        _check_flags(message, name, where)
    return {**message, "content": content or ""}


def _renamed(turn: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A message with ``role`` and ``content``, from one with ``from`` and ``value``."""
    if "role" in turn or "from" not in turn:
        return turn
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role = _ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise InputError(
            f"{where}: {name}.from must be one of {', '.join(_ROLES)}, got "
            f"{shortened(turn['from'])}; write role and content instead"
        )
    if role == "function_call":
        return {**others, "role": "assistant", "tool_calls": turn.get("value")}
    return {**others, "role": role, "content": turn.get("value")}


def _joined(content: Any, name: str, where: str) -> Any:
    """The text of a list of parts, which templates write one after the other."""
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content):
        text = part
        if isinstance(part, dict):
            kind = part.get("type", "text")
            if kind not in _TEXT_PARTS:
                raise InputError(
                    f"{where}: {name}[{number}] must be text, got a part of type "
                    f"{shortened(kind)}; only text is trained on, so remove the row"
                )
            text = part.get("text")
        if not isinstance(text, str):
            raise InputError(
                f"{where}: {name}[{number}] must be a text part, got {shortened(part)}; "
                "correct or remove the row"
            )
        texts.append(text)
    return "".join(texts)


def _calls(message: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    """The calls of tools in a message, their arguments as objects."""
    calls, place = message.get("tool_calls"), f"{name}.tool_calls"
    if not calls and message.get("function_call"):
        calls, place = message["function_call"], f"{name}.function_call"
    calls = _parsed(calls, place, where)
    if not calls:
        return []
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(
            f"{where}: {place} must be a list of objects, got {shortened(calls)}; correct the row"
        )
    return [_call(call, f"{place}[{i}]", where) for i, call in enumerate(calls)]


def _call(call: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    function = _parsed(call.get("function", call), f"{name}.function", where)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(
            f"{where}: {name} must have a function with a name, got {shortened(call)}; "
            "correct the row"
        )
    arguments = function.get("arguments", {})
    # No arguments at all are an empty text for some.
    parsed: Any = {} if arguments == "" else _parsed(arguments, f"{name}.arguments", where)
    if not isinstance(parsed, dict):
        raise InputError(
            f"{where}: {name}.arguments must be a JSON object, got {shortened(arguments)}; "
            "correct the row"
        )
    function = {**function, "arguments": parsed}
    others: dict[str, Any] = call if "function" in call else {}
    return {"type": "function", **others, "function": function}


def _check_flags(message: dict[str, Any], name: str, where: str) -> None:
    for key in _TRAINED:
        if key in message and message[key] not in (0, 1):
            raise InputError(
                f"{where}: {name}.{key} must be 0 or 1, got {shortened(message[key])}; messages "
                "are trained or not, so write one of these"
            )


def _parsed(value: Any, name: str, where: str) -> Any:
    return parse_json(value, f"{where}: {name}") if isinstance(value, str) else value
