"""A conversation has several answers: each is an example whose prompt is all that comes before it.

So a turn is edited and read in training as it will be at inference, where the whole conversation is
run anew for each answer. One pass over all turns could not do that: the last tokens of one prompt
are edited for its own answer alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.chats import answer_text, is_trained

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import Turns


def of_turns(rows: Sequence[Row], turns: Turns) -> list[Row]:
    """Return the rows, or, of ``all`` turns, a row for each answer of a chat."""
    if turns == "last":
        return list(rows)
    return [part for row in rows for part in (_parts(row) if row.kind == "messages" else [row])]


def split_turns(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Split conversations for a trainer of your own or TRL's: a record for each answer.

    Args:
        records: Each has ``messages``; other keys are kept. Those without are kept as they are.

    Returns:
        For every assistant message that has something before it and no ``weight: 0``, a record
        with all messages before it as ``prompt`` and it alone as ``completion``, in place of
        ``messages``.
    """
    found: list[dict[str, Any]] = []
    for record in records:
        messages = record.get("messages")
        if not isinstance(messages, list):
            found.append(dict(record))
            continue
        kept = {key: value for key, value in record.items() if key != "messages"}
        for end in _ends(messages):
            prompt, completion = messages[: end - 1], messages[end - 1 : end]
            found.append({**kept, "prompt": prompt, "completion": completion})
    return found


def _parts(row: Row) -> list[Row]:
    parts = []
    for end in _ends(row.messages):
        source = row.source if end == len(row.messages) else f"{row.source}, message {end}"
        response = answer_text(row.messages[end - 1])
        parts.append(replace(row, source=source, messages=row.messages[:end], response=response))
    return parts


def _ends(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many messages there are up to each answer, itself included."""
    return [
        number
        for number, turn in enumerate(messages, start=1)
        if turn.get("role") == "assistant" and number > 1 and is_trained(dict(turn))
    ]
