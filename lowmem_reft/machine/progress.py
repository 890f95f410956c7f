"""Progress bars for what takes longer than a moment; on standard error, none without a terminal."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

T = TypeVar("T")

_switches = {"shown": True}


def show_bars(shown: bool) -> None:
    """Show bars in this process or, as ``--quiet`` wants it, none at all."""
    _switches["shown"] = shown


def progress(items: Sequence[T], what: str, *, quiet: bool) -> Iterator[T]:
    """Iterate over ``items`` with a bar that says ``what`` is being done and how long it takes."""
    with counter(what, quiet=quiet) as told:
        for number, item in enumerate(items):
            told(number, len(items))
            yield item


@contextmanager
def counter(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield what shows a bar when it is told how much of how much is done."""
    if quiet or not _switches["shown"]:
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
