"""A JSONL file of answers that is written line by line and completed after an interruption.

A file beside it says what made the answers, so that others are not added to them.
"""

from __future__ import annotations

import fcntl
import json
from typing import TYPE_CHECKING, Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import write_text_whole

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import TextIO


def as_line(question: dict[str, Any], response: str) -> str:
    """Return the line of one answer: what was asked, then ``response``."""
    return json.dumps({**question, "response": response}, ensure_ascii=False) + "\n"


def keep_answers(path: Path, questions: Sequence[dict[str, Any]], run: dict[str, Any]) -> list[str]:
    """Return the answers that a file already holds; cut off a last line that is not whole.

    The file is left as it is if it holds anything else than answers to the first questions.

    Args:
        path: Of the file; it need not be there.
        questions: What each line is to hold besides its ``response``, in order.
        run: What makes the answers, see ``note_run``.

    Raises:
        InputError: something else made the answers, a line answers another question, or there are
            more lines than questions.
    """
    if path.is_dir():
        raise InputError(f"output must be a file, got the directory {str(path)!r}; name a file")
    if not path.is_file():
        return []
    _check_run(path, run)
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
    return [answer for answer in answers if answer is not None]


def lock(stream: TextIO, *, as_it_was: int | None) -> bool:
    """Keep other processes from writing to a file until it is closed.

    Args:
        stream: The file, opened to append to.
        as_it_was: Lines that it is to have, as read before; None: any.

    Returns:
        False if another process is writing to it, or has since it was read. Else the file ends
        with a whole line: what a killed process wrote of the next one is cut off.
    """
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if as_it_was is None:
        return True
    with open(stream.name, "rb") as file:
        content = file.read()
    if content.count(b"\n") != as_it_was:
        return False
    stream.truncate(content.rfind(b"\n") + 1)
    return True


def note_run(path: Path, run: dict[str, Any]) -> None:
    """Write down what makes the answers of a file, in ``<file>.run.json`` beside it.

    Args:
        path: Of the file, which is there. If it holds answers, they must be of the same run.
        run: Values by name, as JSON has them; what is not known is None and never compared.

    Raises:
        InputError: something else made the answers that are there.
    """
    _check_run(path, run)
    text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
    write_text_whole(_run_file(path), text)


def _check_run(path: Path, run: dict[str, Any]) -> None:
    if not path.stat().st_size:  # interrupted before the first answer
        return
    noted = _run_file(path)
    try:
        before = json.loads(noted.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise InputError(
            f"output must be a new file or one that this command began, got {str(path)!r} without "
            f"{noted.name}, which says what made its answers; name another file, or add --overwrite"
        )
    differs = [
        f"{name} {value!r} (was {before[name]!r})"
        for name, value in run.items()
        if None not in (value, before.get(name)) and value != before[name]
    ]
    if differs:
        raise InputError(
            f"output must be completed as it was begun, got {', '.join(differs)} for "
            f"{str(path)!r}; name another file, or add --overwrite"
        )


def _run_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")


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
