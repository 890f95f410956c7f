"""Progress bars for what takes longer than a moment; on standard error, none without a terminal.

A process that another one watches tells in lines of its log instead how far it is.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

T = TypeVar("T")

_switches = {"shown": True}

_EVERY_S = 2.0
_TAIL_BYTES = 4096


@dataclass
class _Lines:
    """What a process has told in lines."""

    wanted: bool = False
    what: str = ""
    told_s: float = 0.0


_lines = _Lines()


def show_bars(shown: bool) -> None:
    """Show bars in this process or, as ``--quiet`` wants it, none at all."""
    _switches["shown"] = shown


@contextmanager
def without_bars_of_transformers() -> Iterator[None]:
    """Hide the bars of transformers (``Loading weights``) for a while; leave them as they were."""
    from transformers.utils import logging  # here, as it takes long

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


def progress(items: Sequence[T], what: str, *, quiet: bool) -> Iterator[T]:
    """Iterate over ``items`` with a bar that says ``what`` is being done and how long it takes."""
    with counter(what, quiet=quiet) as told:
        for number, item in enumerate(items):
            told(number, len(items))
            yield item


def say_in_lines() -> None:
    """Tell on standard output how far this process is: ``progress: step 3/400``."""
    _lines.wanted = True


def tell(what: str, done: int, total: int) -> None:
    """Say how much of how much is done, if lines are wanted and it is time for one."""
    now = time.monotonic()
    is_time = what != _lines.what or now - _lines.told_s >= _EVERY_S
    if _lines.wanted and total > 1 and is_time:
        _lines.what, _lines.told_s = what, now
        print(f"progress: {what} {done}/{total}", flush=True)


def last_told(log: Path) -> str:
    """Return what a process told last in its log, ``step 3/400``; empty if it told nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            tail = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    told: list[str] = re.findall(r"^progress: (.+)\n", tail, re.MULTILINE)
    return told[-1] if told else ""


@contextmanager
def counter(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield what shows a bar when it is told how much of how much is done."""
    if quiet or not _switches["shown"]:
        yield lambda done, total: tell(what, done, total)
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
