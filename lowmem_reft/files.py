"""Files that are complete or absent, also if the process is killed while it writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a file beside ``path``, then put it in its place; return ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    write(temporary)
    temporary.replace(path)
    return path


def write_text_whole(path: Path, text: str) -> Path:
    """Write a text file, UTF-8, the same way; return ``path``."""
    return write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
