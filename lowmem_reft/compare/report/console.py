"""What a comparison says on the terminal: progress and the table, both on standard error."""

from __future__ import annotations

import math
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.engines.launch import LOG_FILE
from lowmem_reft.compare.report.table import Measure, Summary, columns
from lowmem_reft.compare.report.verdict import Verdict, sentences
from lowmem_reft.data.tasks.metrics import unit_of
from lowmem_reft.machine.progress import last_told
from lowmem_reft.machine.terminal import harmless

_WIDE = 120
_LEAST_FIRST = (
    *(
        "tokens_to_reference",
        "steps_to_reference",
        "real_percent",
        "trainable_percent",
        "rss_bytes",
    ),
    *("reserved_bytes", "loss", "tokens_per_s", "build_time_s", "time_to_reference_s"),
)
"""Columns that are left out, in this order, where the terminal is narrow."""
_TEXT_WIDTH = 16
"""Names are folded to this before a column is left out."""

_INDENT, _JOINED = "  ", "\N{NO-BREAK SPACE}"


class _Started(NamedTuple):
    """A cell that runs."""

    name: str
    log: Path
    trains: bool
    start: float
    """By the clock of the progress, seconds."""


class _Words(progress.ProgressColumn):
    """Words that change while cells run."""

    def __init__(self, words: Callable[[], str], style: str = "") -> None:
        super().__init__()
        self._words, self._style = words, style

    def render(self, task: progress.Task) -> Text:
        return Text(self._words(), style=self._style)


class Progress:
    """A bar with the running cells and a line for each that ended; only lines in a log file.

    Once a cell that trains has ended, both say about how long the others will take: as long as
    those that ended, as many at the same time as have been.
    """

    def __init__(
        self,
        num_cells: int,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch ``num_cells`` cells; ``quiet`` shows nothing. ``clock`` counts seconds."""
        self._console = console or Console(stderr=True, quiet=quiet, soft_wrap=True)
        self._num_cells = num_cells
        self._num_finished = 0
        self._clock = clock
        self._running: list[_Started] = []
        self._most_at_once = 1
        self._took_s: list[float] = []
        self._bar = progress.Progress(
            progress.BarColumn(24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            _Words(self._left, "progress.remaining"),
            _Words(self._at_work),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=num_cells)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._bar.stop()

    def started(self, cell: Cell) -> None:
        """Name the cell beside the bar, with the step it is at."""
        log = cell.directory / LOG_FILE
        self._running.append(_Started(cell.name, log, cell.train is not None, self._clock()))
        self._most_at_once = max(self._most_at_once, len(self._running))

    def finished(self, cell: Cell, result: Result, *, skipped: bool) -> None:
        """Move the bar and say how the cell ended."""
        outcome = _outcome(cell, result, skipped)
        self.ended(cell.name, outcome, ran=not skipped, failed=bool(result["error"]))

    def ended(self, name: str, outcome: str, *, ran: bool, failed: bool) -> None:
        """Move the bar and say how a cell that had been started, or had not to be, ended."""
        if ran:
            cell = next(each for each in self._running if each.name == name)
            self._running.remove(cell)
            if cell.trains and not failed:
                self._took_s.append(self._clock() - cell.start)
        self._num_finished += 1
        self._bar.update(self._task, advance=1)
        left = f", {words}" if (words := self._left()) else ""
        line = harmless(f"[{self._num_finished}/{self._num_cells}] {name}: {outcome}{left}")
        self._console.print(line, style="red" if failed else None, markup=False, highlight=False)

    def _at_work(self) -> str:
        """The cells that run, each with what its log says last of how far it is."""
        running = [*self._running]  # the bar is drawn by another thread
        return ", ".join(f"{cell.name} {last_told(cell.log)}".rstrip() for cell in running)

    def _left(self) -> str:
        """About how long it will still take, in words; nothing while that cannot be known."""
        running = [*self._running]  # the bar is drawn by another thread
        num_waiting = self._num_cells - self._num_finished - len(running)
        if not self._took_s or not (num_waiting or running):
            return ""
        each, now = statistics.fmean(self._took_s), self._clock()
        begun = sum(max(0.0, each - (now - cell.start)) for cell in running if cell.trains)
        return f"about {_duration((num_waiting * each + begun) / self._most_at_once)} left"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def print_table(rows: Sequence[Summary], console: Console | None = None) -> None:
    """Print the rows; what failed follows below, with the reason.

    Columns that matter least are left out until the rest fits; all are in the files and on the
    page. Where even those that matter most do not, each method has lines of its own.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        console.width = _WIDE
    shown = columns(rows)
    fits = _fits(console, shown, rows)
    for name in _LEAST_FIRST:
        if fits:
            break
        shown = [column for column in shown if column.field != name]
        fits = _fits(console, shown, rows)
    if fits:
        console.print(_table(shown, rows))
    else:
        _print_lines(console, shown, rows)
    for row in rows:
        for error in row.errors:
            line = harmless(f"{row.method} {error}")
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _fits(console: Console, shown: Sequence[Measure], rows: Sequence[Summary]) -> bool:
    endless = console.options.update(width=sys.maxsize)
    narrowest = _table(shown, rows, text_width=_TEXT_WIDTH)
    return console.measure(narrowest, options=endless).minimum <= console.width


def _print_lines(console: Console, shown: Sequence[Measure], rows: Sequence[Summary]) -> None:
    """Each method's name, whole, and below it what was measured, broken between the figures."""
    names = [column for column in shown if column.kind == "text"]
    measures = [column for column in shown if column.kind != "text"]
    for row in rows:
        name = ", ".join(column.text(row) for column in names)
        console.print(Text(harmless(name), style="bold", overflow="fold"))
        found = (f"{column.title} {column.text(row)}".replace(" ", _JOINED) for column in measures)
        lines = textwrap.wrap(", ".join(found), max(1, console.width - len(_INDENT)))
        text = "\n".join(_INDENT + line.replace(_JOINED, " ") for line in lines)
        console.print(harmless(text), markup=False, highlight=False)


def print_verdicts(verdicts: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print which method to take; each is a line where no one is watching."""
    console = console or Console(stderr=True)
    for line in sentences([Verdict(**each) for each in verdicts]):
        text = harmless(line)
        console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _table(
    shown: Sequence[Measure], rows: Sequence[Summary], *, text_width: int | None = None
) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in shown:
        if column.kind == "text":
            table.add_column(column.title, overflow="fold", min_width=10, max_width=text_width)
        else:
            width = max(len(column.text(row)) for row in rows)
            title = column.title.replace(" ", "\n")
            table.add_column(title, justify="right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*(escape(harmless(column.text(row))) for column in shown))
    return table


def _outcome(cell: Cell, result: dict[str, Any], skipped: bool) -> str:
    if result["error"]:
        return f"failed: {result['error']} (see {cell.directory / 'log.txt'})"
    value, unit = result["value"], unit_of(result["metric"])
    score = f"{result['metric']} {unit.text(math.nan if value is None else value)}{unit.sign}"
    return f"{score}, finished before" if skipped else f"{score} in {result['wall_time_s']:.0f} s"
