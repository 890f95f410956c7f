"""A JSONL file of answers that is written line by line and completed after an interruption."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def as_line(question: dict[str, Any], response: str) -> str:
    """Return the line of one answer: what was asked, then ``response``."""
    return json.dumps({**question, "response": response}, ensure_ascii=False) + "\n"


def keep_answers(path: Path, questions: Sequence[dict[str, Any]]) -> list[str]:
    """Return the answers that a file already holds; cut off a last line that is not whole.

    The file is left as it is if it holds anything else than answers to the first questions.

    Args:
        path: Of the file; it need not be there.
        questions: What each line is to hold besides its ``response``, in order.

    Raises:
        InputError: a line answers another question, or there are more lines than questions.
    """
    if path.is_dir():
        raise InputError(f"output must be a file, got the directory {str(path)!r}; name a file")
    if not path.is_file():
        return []
    *lines, rest = path.read_bytes().split(b"\n")
    if len(lines) > len(questions):
        raise _other(path, len(questions) + 1)
    answers = []
    for number, (line, question) in enumerate(zip(lines, questions, strict=False), start=1):
        answers.append(_answer(line, question))
        if answers[-1] is None:
            raise _other(path, number)
    if rest:
        # What stands before the response is known, so nothing that is not ours is cut off.
        start = b"" if len(lines) == len(questions) else as_line(questions[len(lines)], "").encode()
        start = start.removesuffix(b'"}\n')
        if not (start and (rest.startswith(start) or start.startswith(rest))):
            raise _other(path, len(lines) + 1)
        os.truncate(path, path.stat().st_size - len(rest))
    return [answer for answer in answers if answer is not None]


def _answer(line: bytes, question: dict[str, Any]) -> str | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("response"), str):
        return None
    response = str(content.pop("response"))
    return response if content == question else None


def _other(path: Path, number: int) -> InputError:
    return InputError(
        f"output must be a new file or hold answers of the same adapters to the same prompts, got "
        f"something else in {str(path)!r}, line {number}; name another file, or add --overwrite"
    )
