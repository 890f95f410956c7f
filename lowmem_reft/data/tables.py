"""Records of CSV files as spreadsheets and pandas write them.

The separator is a comma, semicolon, tab or bar, which the header shows; names of columns may have
spaces around them. Text that is not UTF-8 or UTF-16 is read as Windows-1252, with a warning.
"""

from __future__ import annotations

import codecs
import csv
import re
import sys
import warnings
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.columns import NAMES
from lowmem_reft.data.text import encoding_of, opened, parse_json
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SEPARATORS = (",", ";", "\t", "|")
_INTEGER = re.compile(r"-?\d+(\.0+)?")
_NAMED = re.compile(r"sep=(.)\r?\n?")
"""The line before the header by which Excel is told the separator."""


def csv_records(path: Path, _split: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, record) for every row: cells are text, ``choices`` JSON, integers integers.

    Empty cells are None, and rows of empty cells alone are left out. ``label``, and ``answer``
    beside choices, may be written ``1.0``, as pandas does where the column has a hole.

    Raises:
        InputError: It is no CSV, a name of a column is repeated, or a row has too many cells.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # 131,072 characters if not told otherwise
    encoding = _encoding(path)
    with opened(path) as stream, TextIOWrapper(stream, encoding=encoding, newline="") as lines:
        num_before, line = 1, next(lines, "")
        while line and not line.strip():
            num_before, line = num_before + 1, next(lines, "")
        separator = _NAMED.fullmatch(line)
        if separator:
            num_before, line = num_before + 1, next(lines, "")
        style: dict[str, Any] = _style(line, separator[1] if separator else None)

        def from_header() -> Iterator[str]:
            yield line
            yield from lines

        yield from _records(path, csv.reader(from_header(), strict=True, **style), num_before - 1)


def _encoding(path: Path) -> str:
    """UTF-8 or UTF-16; Windows-1252 where it is neither, with a warning."""
    with opened(path) as stream:
        head = stream.read(4)
        encoding = encoding_of(head)
        decoder = codecs.getincrementaldecoder(encoding)()
        part = head
        try:
            while part:
                decoder.decode(part)
                part = stream.read(2**20)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            if not encoding.startswith("utf-8"):
                raise
            warnings.warn(
                f"{path}: read as Windows-1252, because it is not UTF-8; save it as UTF-8 if "
                "letters are wrong",
                stacklevel=2,
            )
            return "cp1252"
    return encoding


def _style(header: str, separator: str | None) -> dict[str, Any]:
    """How the header is written: the separator that finds most names, and a space behind it."""

    def names(separator: str) -> list[str]:
        return next(csv.reader([header], delimiter=separator, skipinitialspace=True), [])

    def num_found(separator: str) -> tuple[int, int]:
        cells = names(separator)
        return sum(cell.strip() in NAMES for cell in cells), len(cells)

    chosen = separator or max(_SEPARATORS, key=num_found)
    rest = next(csv.reader([header], delimiter=chosen), [])[1:]
    is_spaced = bool(rest) and all(cell.startswith(" ") for cell in rest)
    return {"delimiter": chosen, "skipinitialspace": is_spaced}


def _records(path: Path, reader: Any, num_before: int) -> Iterator[tuple[str, Any]]:
    def cells_of_next() -> list[str] | None:
        line = num_before + reader.line_num + 1
        try:
            return next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path}:{line}: must be valid CSV, got {error}; use JSON lines"
            ) from error

    names = [name.strip() for name in cells_of_next() or []]
    repeated = [name for name in names if name and names.count(name) > 1]
    if repeated:
        raise InputError(
            f"{path}:{num_before + 1}: must have every column once, got {repeated[0]!r} twice; "
            "rename or remove one"
        )
    while (cells := cells_of_next()) is not None:
        # A cell in quotes may hold line breaks: the row is named by its first line.
        num_breaks = sum(cell.count("\n") for cell in cells)
        where = f"{path}:{num_before + reader.line_num - num_breaks}"
        if not any(cell.strip() for cell in cells):
            continue
        beyond = [cell for cell in cells[len(names) :] if cell]
        if beyond:
            raise InputError(
                f"{where}: must have as many cells as the header, got {beyond!r} beyond; put "
                "cells with the separator in them in quotes"
            )
        # Of columns without a name only what they hold matters: rows says that it is ignored.
        pairs = zip(names, cells, strict=False)
        record: dict[str, Any] = {name: cell or None for name, cell in pairs if name or cell}
        yield where, _typed(record, where)


_MOST_DIGITS = 4000
"""Python makes no integers of longer texts."""


def _typed(record: dict[str, Any], where: str) -> dict[str, Any]:
    whole = ["label"]
    if record.get("choices"):
        record["choices"] = parse_json(record["choices"], f"{where}: choices")
        whole.append("answer")
    for name in whole:
        if _INTEGER.fullmatch(record.get(name) or "") and len(record[name]) <= _MOST_DIGITS:
            record[name] = int(record[name].partition(".")[0])
    return record
