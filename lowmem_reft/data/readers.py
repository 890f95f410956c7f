"""Raw records from JSON, CSV and Parquet files or a ``datasets`` id, with their places.

Files are read without a cache or a copy, so that an error can name the line. A name may be in upper
case and, but for Parquet, end in ``.gz``, ``.bz2`` or ``.xz``; JSON may be UTF-8 or UTF-16.
"""

from __future__ import annotations

import json
import lzma
import re
import zlib
from io import TextIOWrapper
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.shapes import rows_in
from lowmem_reft.data.tables import csv_records
from lowmem_reft.data.text import (
    COMPRESSED,
    RepeatedKeyError,
    broken_json,
    encoding_of,
    opened,
    parse_json,
    unique_keys,
)
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TextIO

_HUB_ID = re.compile(r"[\w-]+(/[\w-]+(\.\d[\w-]*)*)?(:[\w.-]+)?")
_SPACE = re.compile(r"[ \t\n\r]*")
_BETWEEN = re.compile(r"[ \t\n\r,]*")


def read_records(source: str, split: str, name: str = "data") -> Iterator[tuple[str, Any]]:
    """Yield (place, unchecked record) for every row of a file or a ``datasets`` id.

    The place is ``file:line``, or ``file, row n`` where there are no lines.

    Args:
        source: The file or id.
        split: Of a ``datasets`` id, or of a JSON object with several lists of rows.
        name: The option that named the source, for messages.

    Raises:
        InputError: If the source is missing, broken or of an unknown kind.
    """
    path = Path(source).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(source):
        yield from _hub_records(source, split, name)
        return
    if path.is_dir():
        raise InputError(f"{name} must be a file, got the directory {source!r}; name a file in it")
    is_compressed = path.suffix.lower() in COMPRESSED
    kind = Path(path.stem if is_compressed else path).suffix.lower()
    # Parquet is compressed inside, and read from where its end says.
    if kind not in _READERS or (is_compressed and kind == ".parquet"):
        raise InputError(
            f"{name} must be a {', '.join(_READERS)} file or a datasets id, got {source!r}; "
            "convert it to JSON lines"
        )
    if not path.is_file():
        raise InputError(f"{name} must be an existing file, got {source!r}; check the path")
    try:
        yield from _READERS[kind](path, split)
    except UnicodeError as error:
        raise InputError(
            f"{name} must be readable UTF-8 text, got {source!r} ({error}); save it as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{name} must be a readable file, got {source!r} ({error}); check the file"
        ) from error


def _json_records(path: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Objects, one a line; else whatever JSON the file holds as a whole."""
    with _text(path) as lines:
        numbered = ((n, line) for n, line in enumerate(lines, start=1) if line.strip())
        first = list(islice(numbered, 2))
        if len(first) == 2 and _is_object(first[0][1]):
            for number, line in chain(first, numbered):
                yield f"{path}:{number}", parse_json(line, f"{path}:{number}")
            return
    with _text(path) as lines:
        text = lines.read()
    try:
        values = list(_values(text, path))
    except InputError:
        if len(first) == 2 and _is_object(first[1][1]):  # lines, and the first one is broken
            parse_json(first[0][1], f"{path}:{first[0][0]}")
        raise
    rows: Any = None
    if len(values) == 1:
        (_, rows), *_ = values
        if isinstance(rows, dict):
            rows = rows_in(rows, split, str(path))
    if isinstance(rows, list):
        values = [(f"{path}, row {number}", row) for number, row in enumerate(rows, start=1)]
    yield from values


def _text(path: Path) -> TextIO:
    with opened(path) as stream:
        encoding = encoding_of(stream.read(4))
    return TextIOWrapper(opened(path), encoding=encoding)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _values(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """The values that stand one after the other in a text, with the lines that they begin in."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    start, line = 0, 1
    while (begin := _after(_SPACE, text, start)) < len(text):
        line += text.count("\n", start, begin)
        try:
            value, start = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                line = error.lineno
            elif isinstance(error, RepeatedKeyError):
                line += text.count("\n", begin, _repeated(text, begin))
            raise broken_json(error, text[begin:], f"{path}:{line}") from error
        yield f"{path}:{line}", value
        line += text.count("\n", begin, start)


def _repeated(text: str, begin: int) -> int:
    """Where the first element of a list begins that has an object with a key twice."""
    position = begin + 1
    try:
        while text[begin] == "[":
            position = _after(_BETWEEN, text, position)
            _, end = json.JSONDecoder().raw_decode(text, position)
            json.loads(text[position:end], object_pairs_hook=unique_keys)
            position = end
    except RepeatedKeyError:
        return position
    except (ValueError, RecursionError):
        pass
    return begin


def _after(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    assert match is not None  # it matches nothing too
    return match.end()


def _parquet_records(path: Path, _split: str) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            records = (record for batch in file.iter_batches() for record in batch.to_pylist())
            for number, record in enumerate(records, start=1):
                yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: must be a Parquet file ({error}); check the file") from error


def _hub_records(source: str, split: str, option: str) -> Iterator[tuple[str, Any]]:
    import datasets

    name, _, config = source.partition(":")
    try:
        records = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        # Not found, offline, no such split or configuration, or it wants to run a script.
        raise InputError(
            f"{option} must be a {', '.join(_READERS)} file or a datasets id with a split "
            f"{split!r}, got {source!r} ({error}); check path, id and split"
        ) from error
    for number, record in enumerate(records, start=1):
        yield f"{source}[{split}], row {number}", record


_READERS = {
    ".jsonl": _json_records,
    ".ndjson": _json_records,
    ".json": _json_records,
    ".csv": csv_records,
    ".tsv": csv_records,
    ".parquet": _parquet_records,
}
