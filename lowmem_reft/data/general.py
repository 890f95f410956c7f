"""General text, by which it is seen what a training has cost a base beside its task.

The text is cut into consecutive windows of tokens. The first half of each is prompt, the second
half is scored: a method that edits prompts then acts as it does at inference, one that changes
weights acts on every token, and the same tokens count for both.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.joint import bos_of
from lowmem_reft.data.readers import read_records
from lowmem_reft.data.text import COMPRESSED, encoding_of, opened
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW_TOKENS = 256
"""Prompt and scored tokens, BOS included."""
_FEWEST_CHARACTERS = 256
_MOST_CHARACTERS_OF_A_TOKEN = 16
"""On average, far above any language's: what lies behind is not tokenized in vain."""


def read_general(source: str) -> str:
    """Return the text of a ``.txt`` file, or of the rows of another file, a blank line between.

    Args:
        source: A ``.txt`` file (perhaps ``.gz``, ``.bz2`` or ``.xz``), or one of the readers' with
            a text in the column ``text`` of every row.

    Raises:
        InputError: The file is not there, cannot be read, or holds next to no text.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"forgetting must be an existing file, got {source!r}; check the path")
    inner = path.stem if path.suffix.lower() in COMPRESSED else path
    text = _plain(path) if Path(inner).suffix.lower() == ".txt" else _of_rows(str(path))
    num_characters = len("".join(text.split()))
    if num_characters < _FEWEST_CHARACTERS:
        raise InputError(
            f"forgetting must hold at least {_FEWEST_CHARACTERS} characters of text, got "
            f"{num_characters} in {source!r}; give more"
        )
    return text


def _plain(path: Path) -> str:
    try:
        with opened(path) as stream:
            data = stream.read()
        return data.decode(encoding_of(data[:4])).replace("\r\n", "\n")
    except (OSError, EOFError, ValueError) as error:  # of gzip, and of what is no text
        raise InputError(
            f"forgetting must be a readable file of UTF-8 text, got {str(path)!r} ({error}); save "
            "it as UTF-8"
        ) from error


def _of_rows(source: str) -> str:
    texts = []
    for where, record in read_records(source, "train", "forgetting"):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(
                f"{where}: a row of forgetting must have a text, got {text!r}; name the column "
                "text, or give a .txt file"
            )
        texts.append(text)
    return "\n\n".join(texts)


def general_digest(text: str) -> str:
    """SHA-256 (hex) of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def encode_windows(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int,
    num_positions: int | None = None,
) -> list[dict[str, list[int]]]:
    """Cut a text into windows: BOS if the tokenizer adds one, then the tokens that are next.

    What is left over at the end makes no window, unless it would be the only one.

    Args:
        text: The text.
        tokenizer: The base's.
        limit: Most windows.
        num_positions: Of the base; a window takes at most half of them, so that there is room for
            virtual tokens.

    Returns:
        ``input_ids`` and ``labels`` of each window; labels are -100 on its first half.
    """
    length = min(WINDOW_TOKENS, max(2, (num_positions or 2 * WINDOW_TOKENS) // 2))
    start = bos_of(tokenizer)
    size = length - len(start)
    part = text[: limit * size * _MOST_CHARACTERS_OF_A_TOKEN]
    ids: list[int] = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
    ends = range(size, min(len(ids), limit * size) + 1, size)
    windows = [start + ids[end - size : end] for end in ends] or [start + ids]
    return [
        {"input_ids": window, "labels": [IGNORED_LABEL] * half + window[half:]}
        for window in windows
        if (half := len(window) // 2)
    ]
