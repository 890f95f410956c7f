"""A JSONL file of answers that is written line by line and completed after an interruption.

A file beside it says what made the answers, so that others are not added to them.
"""

from __future__ import annotations

import fcntl
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json, write_text_whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import TextIO


def as_line(question: dict[str, Any], response: str) -> str:
    """Return the line of one answer: what was asked, then ``response``."""
    return json.dumps({**question, "response": response}, ensure_ascii=False) + "\n"


def keep_answers(path: Path, questions: Sequence[dict[str, Any]], run: dict[str, Any]) -> list[str]:
    """Return the answers that a file already holds; cut off a last line that is not whole.

    The file, which need not be there, is left as it is if it holds anything else than answers to
    the first of ``questions``: what each line is to hold besides its ``response``.

    Raises:
        InputError: Something else made the answers, a line answers another question, or there are
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


@contextmanager
def opened(path: Path, run: dict[str, Any], *, num_kept: int | None) -> Iterator[TextIO]:
    """Open a file to append answers to; until it is closed no other process writes to it.

    It must have the ``num_kept`` lines that were read of it, and what a killed process wrote of the
    next one is cut off; with None it is emptied. What makes the answers is written down beside it,
    in ``<file>.run.json``; in ``run`` what is not known is None and never compared.

    Raises:
        InputError: Another process is writing to the file, or has since it was read; or something
            else made the answers that are there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        if path.is_file():  # not a device
            if not _lock(stream, num_kept):
                raise InputError(
                    f"output must be written by one process, got {str(path)!r}, which another one "
                    "is writing; name another file"
                )
            if num_kept is None:
                stream.truncate(0)
            _check_run(path, run)
            text = json.dumps(run, indent=2, ensure_ascii=False) + "\n"
            write_text_whole(_run_file(path), text)
        yield stream


def _lock(stream: TextIO, num_kept: int | None) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    if num_kept is not None:
        with open(stream.name, "rb") as file:
            content = file.read()
        if content.count(b"\n") != num_kept:
            return False
        stream.truncate(content.rfind(b"\n") + 1)
    return True


def _check_run(path: Path, run: dict[str, Any]) -> None:
    if not path.stat().st_size:  # interrupted before the first answer
        return
    noted = _run_file(path)
    try:
        before = parse_json(noted.read_bytes())
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
        content = parse_json(line)
    except ValueError:
        return None
    response = content.pop("response", None) if isinstance(content, dict) else None
    return response if isinstance(response, str) and content == question else None


def _other(path: Path, number: int) -> InputError:
    return InputError(
        f"output must be a new file or hold answers of the same adapters to the same prompts, got "
        f"something else in {str(path)!r}, line {number}; name another file, or add --overwrite"
    )
