"""Files that are complete or absent, also if the process is killed; JSON, checked."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a file beside ``path``, then put it in its place; return ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
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


def parse_json(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is none, is no UTF-8, is nested too deeply, or has an integer of thousands of
            digits.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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
        return type(value) in (int, float) and abs(value) < math.inf
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
