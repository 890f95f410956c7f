"""Rows to train on or to score, checked one by one; errors name file and line.

A source holds rows of one kind; ``formats`` says under which other names they are read:

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
the choices stand for, ``target``. A chat's ``tools``, ``documents`` and ``chat_template_kwargs``
are given to the chat template, and a ``system`` column is its system message; prompts with a
``system`` or a ``history`` column become chats, all of a source. Other columns are ignored, with a
warning.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.chats import argument_columns, as_column
from lowmem_reft.data.formats import Record, understood
from lowmem_reft.data.readers import read_records
from lowmem_reft.data.row import Row as Row
from lowmem_reft.data.row import as_chat, check_different, checked_row
from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.machine.files import write_text_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

_WANTED = "prompt + response, messages, prompt + choices + answer, text + label, or text + target"
_TO_ANSWER = "prompt or messages"


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """The rows of a source, and how they were read."""

    rows: list[Row]
    """At least one, all of one kind."""
    columns: tuple[str, ...]
    """Columns that rows were made of."""
    ignored: tuple[str, ...]
    """Columns that hold something and that nothing reads."""

    def rows_of(self, source: str | Path) -> list[Row]:
        """Return the rows of what ``load_...`` was asked for; warn of columns that are ignored."""
        if self.ignored:
            named = ", ".join(self.ignored)
            warnings.warn(f"{source}: columns that are ignored: {named}", stacklevel=3)
        return self.rows


def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    require_response: bool = True,
) -> list[Row]:
    """Read and check rows; warn once, in one line, of columns that nothing reads.

    Args:
        source: A ``.jsonl``, ``.ndjson``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file (all
            but the last may be compressed), or a ``datasets`` id, with its configuration after a
            colon where it has several (``openai/gsm8k:main``).
        split: Split of a ``datasets`` id, or the list to take in a JSON object of several.
        limit: Read only the first rows.
        require_response: False also takes prompts and chats that are still to be answered, as
            ``generate --input`` does; errors then name that option.

    Raises:
        InputError: If the source cannot be read or a row is wrong; the message names file and line.
    """
    read = read_rows(source, split=split, limit=limit, require_response=require_response)
    return read.rows_of(source)


def read_rows(
    source: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    require_response: bool = True,
) -> ReadRows:
    """Read and check rows as ``load_rows`` does, and say which columns were read and which not."""
    check_counts(limit=limit)
    name, wanted = ("data", _WANTED) if require_response else ("input", _TO_ANSWER)
    records: list[Record] = []
    rows: list[Row] = []
    for where, columns in islice(read_records(str(source), split, name), limit):
        record = _understood(columns, where, require_response=require_response)
        row = checked_row(record, where, require_response=require_response)
        if rows and row.kind != rows[0].kind:
            raise InputError(
                f"{where}: all rows must be of one kind, got {row.kind!r} after {rows[0].kind!r}; "
                f"put {row.kind} rows into a file of their own"
            )
        records.append(record)
        rows.append(row)
    if not rows:
        raise InputError(
            f"{name} must have at least one row, got none in {str(source)!r}; give {wanted}"
        )
    if any(record.system or record.history for record in records):
        rows = [as_chat(row, record) for row, record in zip(rows, records, strict=True)]
    return ReadRows(
        rows=rows,
        columns=tuple(dict.fromkeys(name for record in records for name in record.used)),
        ignored=tuple(dict.fromkeys(name for record in records for name in record.left_out)),
    )


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
    check_different(sorted(names), "label", "data")
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
        for name in ("text_pair", "before", "target", "template_arguments"):
            if content[name] in (None, "", {}):
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
        record |= {"messages": as_column(row.messages), "choices": list(row.choices)}
        columns = _COLUMNS.get(row.kind, ("prompt", "response"))
        content = {name: record[name] for name in columns if record[name] is not None}
        records.append(content | argument_columns(row.template_arguments))
    return records


def also_trained(rows: Sequence[Row], trained: Sequence[Row]) -> str:
    """Say how many of the rows to score are trained on too; empty if none is."""
    known = {_content(row) for row in trained}
    number = sum(_content(row) in known for row in rows)
    said = "of its rows are trained on too: their score says nothing of new rows"
    return f"{number:,} of {len(rows):,} {said}" if number else ""


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Write rows as JSON lines that ``load_rows`` reads as the same rows; make the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in as_records(rows))
    return write_text_whole(path, "".join(lines))


def _content(row: Row) -> tuple[str | None, ...]:
    """What is asked and answered, however the answer is chosen."""
    return row.prompt, row.text_pair, repr(row.messages), row.response


def _label(row: Row) -> str:
    if row.label is None:
        raise InputError(
            f"{row.source}: a row must have text and label, got a {row.kind} row; convert the file"
        )
    return row.label


def _understood(columns: Any, where: str, *, require_response: bool) -> Record:
    wanted = _WANTED if require_response else _TO_ANSWER
    if not isinstance(columns, dict):
        raise InputError(
            f"{where}: a row must be a JSON object, got {type(columns).__name__}; give {wanted}"
        )
    record = understood(columns, where, require_response=require_response)
    if record is None:
        present = sorted(str(name) for name, value in columns.items() if value is not None)
        empty = sorted(str(name) for name, value in columns.items() if value is None)
        held, cure = f"{present}", "rename or remove columns"
        if empty:
            held, cure = f"{present}, and nothing in {empty}", f"fill, {cure}"
        if {"chosen", "rejected"} <= {*present}:
            cure = "preferences are trained with TRL, of which the documentation has a page"
        raise InputError(f"{where}: a row must have {wanted}, got {held}; {cure}")
    return record
