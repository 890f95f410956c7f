"""Records of public files with the line they stand on: tab-separated tables, JSON, JSON lines."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json


def read_lines(path: Path, encoding: str = "utf-8-sig") -> Iterator[tuple[str, str]]:
    """Yield (``file:line``, line) for every line that is not blank.

    Raises:
        InputError: If the file cannot be read or decoded.
    """
    try:
        # Only a line feed ends a line: some sets hold carriage returns and Unicode separators.
        with path.open(encoding=encoding, newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data must be a readable {encoding} file, got {str(path)!r} ({error}); check the file"
        ) from error


def read_table(
    path: Path,
    *,
    columns: Sequence[str] | None = None,
    needed: Sequence[str],
    skip_broken: bool = False,
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (``file:line``, cells by column) for the lines of a tab-separated table without quotes.

    Args:
        path: The file.
        columns: Names of the columns of a file without header; further cells are ignored.
        needed: Columns that must be there and not be empty.
        skip_broken: Leave out lines that lack cells, with one warning that counts them.

    Raises:
        InputError: If the header or a line is not as it must be.
    """
    lines = read_lines(path)
    header = columns
    if header is None:
        place, line = next(lines, (f"{path}:1", ""))
        header = line.split("\t")
        if not set(needed) <= set(header):
            raise InputError(
                f"{place}: the header must name the columns {', '.join(needed)} between tabs, got "
                f"{shortened(line)}; give the public file"
            )
    broken = []
    for place, line in lines:
        cells = line.split("\t")
        record = dict(zip(header, cells, strict=False))
        too_long = columns is None and len(cells) > len(header)
        if too_long or not all(record.get(name, "").strip() for name in needed):
            if not skip_broken:
                raise InputError(
                    f"{place}: a line must be '{'<TAB>'.join(header)}', got {shortened(line)}; "
                    "correct it or give the public file"
                )
            broken.append(place)
            continue
        yield place, record
    if broken:
        warnings.warn(
            f"{len(broken)} broken lines were left out, the first is {broken[0]}", stacklevel=2
        )


def read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (``file:line``, record) of JSON lines or of one list of objects.

    The line of an object in a list is the one it starts on.

    Raises:
        InputError: If the file cannot be read or is not valid JSON.
    """
    text = _content(path)
    index = _after_space(text, 0)
    if text[index : index + 1] != "[":
        for place, line in read_lines(path):
            try:
                yield place, parse_json(line)
            except ValueError as error:
                raise _invalid(place, error) from error
        return
    decode, number, counted = json.JSONDecoder().raw_decode, 1, 0
    index = _after_space(text, index + 1)
    while text[index : index + 1] != "]":
        number += text.count("\n", counted, index)
        counted = index
        try:
            record, index = decode(text, index)
        except json.JSONDecodeError as error:
            raise _invalid(f"{path}:{error.lineno}", error) from error
        except (RecursionError, ValueError) as error:  # nested too deeply; a number of many digits
            raise _invalid(f"{path}:{number}", error) from error
        yield f"{path}:{number}", record
        index = _after_space(text, index)
        if text[index : index + 1] == ",":
            index = _after_space(text, index + 1)
        elif text[index : index + 1] != "]":
            wrong = json.JSONDecodeError("Expecting ',' or ']'", text, index)
            raise _invalid(f"{path}:{wrong.lineno}", wrong)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"data must be a readable UTF-8 file, got {str(path)!r} ({error}); check the file"
        ) from error


def _after_space(text: str, index: int) -> int:
    while text[index : index + 1].isspace():
        index += 1
    return index


def _invalid(place: str, error: Exception) -> InputError:
    return InputError(f"{place}: must be valid JSON ({error}); correct it or give the public file")
