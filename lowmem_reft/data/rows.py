"""Rows to train on or to score, checked one by one; errors name file and line.

A source holds rows of one kind; columns that belong to no kind are ignored:

===========================  ====================================================================
columns                      meaning
===========================  ====================================================================
``prompt, response``         continue the prompt with the response
``messages``                 chat of role and content; the last, assistant message is the response
``prompt, choices, answer``  score every choice; trains on ``choices[answer]``
``text, label``              classification; as language modelling the label is the response
``text, target``             regression: the target is a number
===========================  ====================================================================

Rows with a text may have a second one, ``text_pair``; rows with choices may have the number that
the choices stand for, ``target``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.readers import read_records
from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.machine.files import write_text_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

_KINDS = {
    "messages": ("messages",),
    "choices": ("prompt", "choices", "answer"),
    "response": ("prompt", "response"),
    "label": ("text", "label"),
    "target": ("text", "target"),
}
_ALPACA = (
    "of an Alpaca row, write instruction, and input below it where there is one, as prompt, and "
    "output as response"
)
_WANTED = "prompt + response, messages, prompt + choices + answer, text + label, or text + target"
_TO_ANSWER = "prompt or messages"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One checked row; the fields that its kind lacks are empty."""

    source: str
    """Where it was read: ``file:line``, or ``file, row n`` where there are no lines."""
    prompt: str = ""
    """The prompt without template, or the text of a row with ``text``; empty for chats."""
    text_pair: str | None = None
    """The second text of a sentence pair."""
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


def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    require_response: bool = True,
) -> list[Row]:
    """Read and check rows.

    Args:
        source: A ``.jsonl``, ``.json`` (list of objects or JSON lines), ``.csv`` or ``.parquet``
            file, or a ``datasets`` id, with its configuration after a colon where it has several
            (``openai/gsm8k:main``).
        split: Split of a ``datasets`` id.
        limit: Read only the first rows.
        require_response: False also takes prompts and chats that are still to be answered, as
            ``generate --input`` does; errors then name that option.

    Raises:
        InputError: If the source cannot be read or a row is wrong; the message names file and line.
    """
    check_counts(limit=limit)
    name, wanted = ("data", _WANTED) if require_response else ("input", _TO_ANSWER)
    rows: list[Row] = []
    for where, record in islice(read_records(str(source), split, name), limit):
        row = _checked_row(record, where, require_response=require_response)
        if rows and row.kind != rows[0].kind:
            raise InputError(
                f"{where}: all rows must be of one kind, got {row.kind!r} after {rows[0].kind!r}; "
                f"put {row.kind} rows into a file of their own"
            )
        rows.append(row)
    if not rows:
        raise InputError(
            f"{name} must have at least one row, got none in {str(source)!r}; give {wanted}"
        )
    return rows


def label_names(rows: Sequence[Row]) -> list[str]:
    """Class names of ``text, label`` rows: by number if all are integers, else by alphabet.

    Raises:
        InputError: If a row has no label or all have the same.
    """
    names = {_label(row) for row in rows}
    if len(names) < 2:
        raise InputError(
            f"label must take at least two values, got {sorted(names)}; give rows of every class"
        )
    return sorted(names, key=int if all(re.fullmatch(r"-?\d+", name) for name in names) else None)


def as_choices(rows: Sequence[Row], names: Sequence[str] | None = None) -> list[Row]:
    """Turn ``text, label`` rows into choice rows over ``names`` (default: ``label_names(rows)``).

    Both texts of a pair are written into the prompt, one a line. Rows of another kind come back as
    they are.

    Raises:
        InputError: If a label is not in ``names``; the message names the line.
    """
    if not any(row.kind == "label" for row in rows):
        return list(rows)
    names = label_names(rows) if names is None else names
    return [
        replace(
            row,
            prompt=row.prompt if row.text_pair is None else f"{row.prompt}\n{row.text_pair}",
            text_pair=None,
            choices=tuple(names),
            answer=class_index(row, names),
            label=None,
        )
        for row in rows
    ]


def class_index(row: Row, names: Sequence[str]) -> int:
    """Index of the row's label in ``names``.

    Raises:
        InputError: If the row has no label or one that is not in ``names``.
    """
    label = _label(row)
    if label not in names:
        raise InputError(
            f"{row.source}: label must be one of {list(names)}, got {label!r}; "
            "use the labels of the training rows"
        )
    return names.index(label)


def holdout(
    rows: Sequence[Row], fraction: float = 0.1, *, fold: int = 0
) -> tuple[list[Row], list[Row]]:
    """Split rows into (train, held out) by a hash of their content.

    No seed and no order takes part, so every method and seed sees the same split; identical rows
    land on the same side. ``fraction`` counts different rows; each side gets at least one.

    Args:
        rows: All rows.
        fraction: Share that is held out.
        fold: Which one: no row is held out in two folds.

    Raises:
        InputError: If the fraction is not between 0 and 1, fewer than two rows are different, or
            there are not as many folds.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction must be between 0 and 1, got {fraction}; 0.1 holds out a tenth")
    digests = [rows_digest([row]) for row in rows]
    different = sorted(set(digests))
    if len(different) < 2:
        raise InputError(
            f"data must have two different rows to hold one out, got {len(different)}; add rows"
        )
    size = min(max(1, round(fraction * len(different))), len(different) - 1)
    last = len(different) // size - 1
    if not 0 <= fold <= last:
        raise InputError(
            f"fold must be from 0 to {last} for {len(different)} different "
            f"rows and a fraction of {fraction}, got {fold}; choose another"
        )
    held_out = set(different[fold * size : (fold + 1) * size])
    sides: tuple[list[Row], list[Row]] = [], []
    for row, digest in zip(rows, digests, strict=True):
        sides[digest in held_out].append(row)
    return sides


def rows_digest(rows: Sequence[Row]) -> str:
    """SHA-256 (hex) of the rows' content in their order, wherever they were read from."""
    digest = hashlib.sha256()
    for row in rows:
        content = asdict(replace(row, source=""))
        # Rows without these hash as they did before there were such columns.
        for name in ("text_pair", "target", "template_arguments"):
            if content[name] in (None, {}):
                del content[name]
        digest.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


_COLUMNS = {
    "messages": ("messages",),
    "choices": ("prompt", "choices", "answer", "target"),
    "label": ("text", "text_pair", "label", "target"),
    "target": ("text", "text_pair", "label", "target"),
}


def as_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Turn rows back into objects for JSON that ``load_rows`` reads as the same rows."""
    records = []
    for row in rows:
        record = {**vars(row), "text": row.prompt}
        record |= {"messages": list(row.messages), "choices": list(row.choices)}
        columns = _COLUMNS.get(row.kind, ("prompt", "response"))
        records.append({name: record[name] for name in columns if record[name] is not None})
    return records


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as JSON lines that ``load_rows`` reads as the same rows; make the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in as_records(rows))
    return write_text_whole(path, "".join(lines))


def _label(row: Row) -> str:
    if row.label is None:
        raise InputError(
            f"{row.source}: a row must have text and label, got a {row.kind} row; convert the file"
        )
    return row.label


def _checked_row(record: Any, where: str, *, require_response: bool) -> Row:
    """Check one record and build its row; a null is a missing column."""
    wanted = _WANTED if require_response else _TO_ANSWER
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: a row must be a JSON object, got {type(record).__name__}; give {wanted}"
        )
    present = {name for name, value in record.items() if value is not None}
    kinds = [kind for kind, names in _KINDS.items() if present.issuperset(names)]
    if not kinds and not require_response and "prompt" in present:
        kinds = ["prompt"]
    if len(kinds) != 1:
        rule = f"fit only one of: {_WANTED}" if kinds else f"have {wanted}"
        is_alpaca = not kinds and present.issuperset(("instruction", "output"))
        raise InputError(
            f"{where}: a row must {rule}, got {sorted(map(str, present))}; "
            f"{_ALPACA if is_alpaca else 'rename or remove columns'}"
        )
    kind = kinds[0]
    if kind == "messages":
        return _chat_row(record["messages"], where, require_response=require_response)
    if kind in ("label", "target"):
        return _text_row(record, kind, where)
    prompt = _text(record["prompt"], "prompt", where)
    if kind == "choices":
        return _choice_row(prompt, record, where)
    response = _text(record["response"], "response", where) if kind == "response" else None
    return Row(source=where, prompt=prompt, response=response)


def _text_row(record: dict[str, Any], kind: str, where: str) -> Row:
    text, pair = _text(record["text"], "text", where), record.get("text_pair") or None
    pair = None if pair is None else _text(pair, "text_pair", where)
    row = Row(source=where, prompt=text, text_pair=pair)
    if kind == "target":
        return replace(row, target=_target(record["target"], where))
    label = str(record["label"]) if type(record["label"]) is int else record["label"]
    label = _text(label, "label", where, "a non-empty string or an integer")
    return replace(row, response=label, label=label)


def _target(value: Any, where: str) -> float:
    """The number in a cell; in a CSV file it is text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{where}: target must be a number, got {shortened(value)}; correct or remove the row"
        )
    return number


def _choice_row(prompt: str, record: dict[str, Any], where: str) -> Row:
    choices, answer, target = record["choices"], record["answer"], record.get("target")
    if not isinstance(choices, list) or len(choices) < 2:
        raise InputError(
            f"{where}: choices must be a list of two or more texts, got {shortened(choices)}; "
            "correct the row"
        )
    texts = tuple(_text(choice, f"choices[{i}]", where) for i, choice in enumerate(choices))
    if type(answer) is not int or not 0 <= answer < len(texts):
        raise InputError(
            f"{where}: answer must be an integer from 0 to {len(texts) - 1}, got {answer!r}; "
            "give the index of the right choice"
        )
    return Row(
        source=where,
        prompt=prompt,
        response=texts[answer],
        choices=texts,
        answer=answer,
        # The cell of a CSV file is empty where there is none.
        target=None if target in (None, "") else _target(target, where),
    )


def _chat_row(messages: Any, where: str, *, require_response: bool) -> Row:
    is_list = isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages)
    if not is_list or not messages:
        raise InputError(
            f"{where}: messages must be a list of {{role, content}} objects, "
            f"got {shortened(messages)}; correct the row"
        )
    # Parquet and datasets fill the keys that only some messages have with nulls.
    chat = tuple({key: turn[key] for key in turn if turn[key] is not None} for turn in messages)
    for number, turn in enumerate(chat):
        for key in ("role", "content"):
            _text(turn.get(key), f"messages[{number}].{key}", where)
    role = chat[-1]["role"]
    if role == "assistant" and len(chat) < 2:
        raise InputError(
            f"{where}: messages must have a prompt before the response, got one; add the prompt"
        )
    if role != "assistant" and require_response:
        raise InputError(
            f"{where}: the last message must be the assistant's, got {role!r}; add the response"
        )
    return Row(
        source=where,
        messages=chat,
        response=chat[-1]["content"] if role == "assistant" else None,
    )


def _text(value: Any, name: str, where: str, rule: str = "a non-empty string") -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(
            f"{where}: {name} must be {rule}, got {shortened(value)}; correct or remove the row"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON lets half of a surrogate pair through; tokenizers do not.
        raise InputError(
            f"{where}: {name} must be valid Unicode, got {error}; correct or remove the row"
        ) from error
    return value
