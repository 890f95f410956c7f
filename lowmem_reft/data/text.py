"""What every file of text needs: its bytes decompressed, its encoding, its JSON."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any, BinaryIO

from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""How files are opened whose names end so."""


class RepeatedKeyError(ValueError):
    """A key stands twice in one JSON object: Python would keep the last value alone."""


def opened(path: Path) -> BinaryIO:
    """Open a file's bytes, decompressed if its name ends as that of a compressed one."""
    stream: BinaryIO = COMPRESSED.get(path.suffix.lower(), open)(path, "rb")
    return stream


def encoding_of(head: bytes) -> str:
    """Return the encoding that the first bytes of a text show; UTF-8 if they show none."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if len(head) > 1 and 0 in head[:2]:  # no text that is read here begins with a NUL
        return "utf-16-be" if head[0] == 0 else "utf-16-le"
    return "utf-8-sig"


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values, for ``json``.

    Raises:
        RepeatedKeyError: A key is there twice.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return made


def parse_json(text: str, where: str) -> Any:
    """Return what JSON text means; every key of an object stands in it once.

    Raises:
        InputError: It is no JSON, or a key is repeated; the message begins with ``where``.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise broken_json(error, text, where) from error


def broken_json(error: Exception, text: str, where: str) -> InputError:
    """Say what is wrong with a JSON text.

    Besides what is no JSON these are numbers of thousands of digits and thousands of brackets.
    """
    if isinstance(error, RepeatedKeyError):
        return InputError(
            f"{where}: must have every key once, got {str(error)!r} twice; remove one of them"
        )
    return InputError(f"{where}: must be valid JSON, got {shortened(text)} ({error}); correct it")
