"""Files that are complete or absent, also if the process is killed while it writes; JSON, checked.

None is written through a link: a new file takes the place of the link.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Any, Literal, Union, get_args, get_origin

from lowmem_reft.errors import InputError

_LARGEST = 1e100
"""More is no measurement, and no axis of a chart is so long."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_NAME = 50
"""Characters of a file's name that its temporary one has, too: the system takes 255 bytes."""


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a file beside ``path``, then put it in its place; return ``path``.

    A device (/dev/stdout, a pipe) is written as it is.
    """
    if path.parent == Path("/dev") or (path.exists() and not path.is_file()):
        write(path)
        return path
    temporary = path.with_name(f".{path.name[:_LONGEST_NAME]}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # were it a link, its target would be written
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_text_whole(path: Path, text: str) -> Path:
    """Write a text file, UTF-8, the same way; return ``path``."""
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: object) -> Path:
    """Write JSON the same way, in a directory that is made if need be; see ``plain``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(content), indent=1, allow_nan=False)
    return write_text_whole(path, text + "\n")


def open_itself(path: Path, mode: Literal["a", "w", "ab", "wb"]) -> IO[Any]:
    """Open a file that cannot be written whole (a lock, a log); text is UTF-8.

    Raises:
        InputError: The path is a link.
        OSError: It cannot be opened.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    encoding = None if "b" in mode else "utf-8"
    try:
        return open(path, mode, encoding=encoding, opener=opener)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise InputError(
            f"{path} must not be a link, as it is written; remove it, or choose another directory"
        ) from error


def sync(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk before what is written from now on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(directory: Path, num_bytes: int = 2**20) -> None:
    """Write a file to a directory and remove it: torch does not say why it could not write one.

    Raises:
        OSError: It cannot be written, as the disk is full or for another reason, which this names.
    """
    path = directory / f".{os.getpid()}.tmp"
    try:
        path.write_bytes(bytes(num_bytes))
        sync(path)
    finally:
        path.unlink(missing_ok=True)


def sync_tree(directory: Path) -> None:
    """Have a directory and all that is in it on the disk."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is none, is no UTF-8, holds half of a surrogate pair, is nested too deeply,
            or has an integer of thousands of digits.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if _SURROGATE.search(text):
        json.dumps(content, ensure_ascii=False).encode()  # half of a pair is no text
    return content


def fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of a type: a number is finite, and a boolean is no number."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner and type(value) in map(type, inner)
    if origin in (list, dict):
        if not isinstance(value, origin):
            return False
        if isinstance(value, dict):
            return all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
        return all(fits(item, inner[0]) for item in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= _LARGEST
    return type(value) is (NoneType if hint is None else hint)


def plain(content: object) -> Any:
    """Return what JSON has: paths as text, and null for what is not a number (a diverged loss)."""
    if isinstance(content, dict):
        return {name: plain(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return os.fspath(content) if isinstance(content, Path) else content
