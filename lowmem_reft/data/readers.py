"""Raw records from JSONL, JSON, CSV and Parquet files or a ``datasets`` id, with their places.

Files are read without a cache or a copy, so that an error can name the line.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any

from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

_HUB_ID = re.compile(r"[\w-]+(/[\w-]+(\.\d[\w-]*)*)?(:[\w.-]+)?")


def read_records(source: str, split: str, name: str = "data") -> Iterator[tuple[str, Any]]:
    """Yield (place, unchecked record) for every row of a file or a ``datasets`` id.

    The place is ``file:line``, or ``file, row n`` where there are no lines.

    Args:
        source: The file or id.
        split: Of a ``datasets`` id.
        name: The option that named the source, for messages.

    Raises:
        InputError: If the source is missing, broken or of an unknown kind.
    """
    path = Path(source).expanduser()
    if not path.exists() and _HUB_ID.fullmatch(source):
        yield from _hub_records(source, split, name)
        return
    if path.suffix not in _READERS:
        raise InputError(
            f"{name} must be a {', '.join(_READERS)} file or a datasets id, got {source!r}; "
            "convert it to JSON lines"
        )
    if not path.is_file():
        raise InputError(f"{name} must be an existing file, got {source!r}; check the path")
    try:
        yield from _READERS[path.suffix](path)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{name} must be readable UTF-8 text, got {source!r} ({error}); check the file"
        ) from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: must be valid JSON, got {shortened(text)} ({error}); correct it"
        ) from error


def _jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{number}", _json(line, f"{path}:{number}")


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    """One list of objects, or JSON lines after all, as many files named ``.json`` are."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        yield from _jsonl_records(path)
        return
    for number, record in enumerate(_json(text, str(path)), start=1):
        yield f"{path}, row {number}", record


def _csv_records(path: Path) -> Iterator[tuple[str, Any]]:
    """Cells are text: ``choices`` and ``messages`` hold JSON, ``answer`` an integer."""
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        while True:
            try:
                record: dict[Any, Any] | None = next(reader, None)
            except csv.Error as error:
                raise InputError(
                    f"{path}:{reader.line_num + 1}: must be valid CSV, got {error}; use JSON lines"
                ) from error
            if record is None:
                return
            if None in record:
                raise InputError(
                    f"{path}:{reader.line_num}: must have as many cells as the header, "
                    f"got {record[None]!r} beyond; put cells with commas in quotes"
                )
            # A cell in quotes may hold line breaks: the row is named by its first line.
            num_breaks = sum((cell or "").count("\n") for cell in record.values())
            where = f"{path}:{reader.line_num - num_breaks}"
            for name in ("choices", "messages"):
                if record.get(name):
                    record[name] = _json(record[name], f"{where}: {name}")
            if re.fullmatch(r"-?\d+", record.get("answer") or ""):
                record["answer"] = int(record["answer"])
            yield where, record


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
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
    ".jsonl": _jsonl_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}
