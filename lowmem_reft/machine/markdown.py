"""Markdown in which what users write is text: it opens no code, table, link or HTML of its own.

The rules are those of CommonMark and, for tables, of GitHub, which the hub follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"[\\`*_{}\[\]<>#|~!&]")


def plain(value: object) -> str:
    """Return a text in one line that nothing in it formats."""
    return _SPECIAL.sub(r"\\\g<0>", _in_one_line(str(value)))


def code(value: object) -> str:
    """Return inline code, in one line; also in the cell of a table."""
    text = _in_one_line(str(value))
    fence = "`" * (_longest_run(text) + 1)
    # One blank on both sides is left out again by whoever shows it.
    inner = f" {text} " if text.startswith("`") or text.endswith("`") or not text else text
    return f"{fence}{inner}{fence}".replace("|", r"\|")


def fenced(text: str, language: str) -> str:
    """Return a block of code."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(rows: Iterable[tuple[str, str]], head: Sequence[str] = ("", "")) -> str:
    """Return a table of two columns; its cells are Markdown in one line each."""
    lines = [f"| {head[0]} | {head[1]} |", "|:--|:--|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(lines)


def _in_one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
