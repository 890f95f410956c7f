"""Progress bars for what takes longer than a moment; on standard error, none without a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

T = TypeVar("T")


def progress(items: Sequence[T], what: str, *, quiet: bool) -> Iterable[T]:
    """Iterate over ``items`` with a bar that says ``what`` is being done and how long it takes."""
    return items if quiet else _bar(items, what)


def _bar(items: Sequence[T], what: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(items, what, console=console, disable=not console.is_terminal, transient=True)
