"""Text of models and files on a terminal: shown, and never obeyed."""

from __future__ import annotations

import unicodedata
from typing import TextIO

_KEPT = "\n\t"


def harmless(text: str) -> str:
    """Replace control characters, with which a text would move the cursor or change the title.

    Line ends and tabs stay. So do letters of every script, also where they go from right to left,
    but not what overrides the direction of others.
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if _controls(character) else character
        for character in text.replace("\r\n", "\n")
    )


def for_stream(text: str, stream: TextIO) -> str:
    """Return a text as it is, or, for a terminal, without control characters."""
    return harmless(text) if stream.isatty() else text


def _controls(character: str) -> bool:
    if character in _KEPT:
        return False
    return unicodedata.category(character) == "Cc" or unicodedata.bidirectional(character) in (
        *("LRE", "LRO", "RLE", "RLO"),
        *("PDF", "LRI", "RLI", "FSI", "PDI"),
    )
