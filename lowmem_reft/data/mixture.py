"""Rows of several files, all of them or a share: ``a.jsonl,b.jsonl@0.5``.

Commas stand between the files or ``datasets`` ids, as in LLaMA-Factory. A number after ``@`` is the
share of a file's rows that is taken: half of them with 0.5, each twice with 2. Which ones is drawn
once, by the seed, so that every epoch has the same ones. A file whose own name holds a comma or an
``@`` is taken as it is.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_reft.data.rows import ReadRows, read_rows
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.data.rows import Row


@dataclass(frozen=True)
class Part:
    """One source of a mixture."""

    source: str
    """A file or a ``datasets`` id."""
    weight: float = 1.0
    """How often each of its rows is taken, on average."""


def parts_of(source: str, name: str = "data") -> list[Part]:
    """Return the sources that an option names.

    Args:
        source: What was given.
        name: The option, for messages.

    Raises:
        InputError: There is nothing between two commas, or a weight is no number above 0.
    """
    if _exists(source):
        return [Part(source)]
    return [_part(text.strip(), source, name) for text in source.split(",")]


def read_mixture(
    source: str, *, split: str = "train", limit: int | None = None, seed: int = 0
) -> ReadRows:
    """Read and check the rows of every part; of each, ``limit`` takes the first ones.

    Raises:
        InputError: The mixture is written wrong, a part cannot be read, or a row is wrong or of
            another kind than the first; the message names file and line.
    """
    parts = parts_of(source)
    read = [read_rows(part.source, split=split, limit=limit) for part in parts]
    first = read[0].rows[0]
    for part in read[1:]:
        if part.rows[0].kind != first.kind:
            raise InputError(
                f"{part.rows[0].source}: all rows must be of one kind, got {part.rows[0].kind!r} "
                f"rows beside the {first.kind!r} rows of {parts[0].source}; convert one of them"
            )
    rows = [
        row
        for number, (part, own) in enumerate(zip(parts, read, strict=True))
        for row in _drawn(own.rows, part.weight, random.Random(f"{seed} {number}"))
    ]
    return ReadRows(
        rows=rows,
        columns=tuple(dict.fromkeys(column for own in read for column in own.columns)),
        ignored=tuple(dict.fromkeys(column for own in read for column in own.ignored)),
    )


def load_mixture(
    source: str, *, split: str = "train", limit: int | None = None, seed: int = 0
) -> list[Row]:
    """Return the rows of ``read_mixture``; warn once of columns that nothing reads.

    Raises:
        InputError: As there.
    """
    return read_mixture(source, split=split, limit=limit, seed=seed).rows_of(source)


def _part(text: str, source: str, name: str) -> Part:
    if not text:
        raise InputError(
            f"{name} must name a file between commas, got {source!r}; write a.jsonl,b.jsonl"
        )
    path, at, weight = text.rpartition("@")
    if not at or _exists(text):
        return Part(text)
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not path or not 0 < number < math.inf:
        raise InputError(
            f"{name} must have a number above 0 after @, got {weight!r} in {text!r}; write "
            f"{path or 'a.jsonl'}@0.5 for half of its rows"
        )
    return Part(path, number)


def _drawn(rows: Sequence[Row], weight: float, draw: random.Random) -> list[Row]:
    """Take each row as often as the weight says, and as many more as its fraction says."""
    each, rest = divmod(weight, 1)
    more = round(rest * len(rows))
    if not each:
        more = max(more, 1)
    drawn = set(draw.sample(range(len(rows)), more))
    return [row for index, row in enumerate(rows) for _ in range(int(each) + (index in drawn))]


def _exists(source: str) -> bool:
    try:
        return Path(source).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a null character, no such user
        return False
