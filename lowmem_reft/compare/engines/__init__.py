"""Where cells run: in processes of this machine, or as tasks of a Ray cluster.

An engine starts cells and says when they have ended; who starts which cell and when is up to
``queue.py`` (all cells of a comparison) and ``sweep`` (one trial after another). Each cell has a
process of its own with every engine, with the same number of threads, so that its numbers do not
depend on the engine: a fresh one (``launch.py``) or, where that is safe, a copy of one that has
imported everything (``forks.py``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Protocol

from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.engines.cluster import RayEngine, connected
from lowmem_reft.compare.engines.launch import CHILD_COMMAND
from lowmem_reft.compare.engines.processes import ProcessEngine
from lowmem_reft.options import Workers

_STOP_S = 5.0


class Running(Protocol):
    """One cell on its way; its files appear in the cell's directory while it runs."""

    @property
    def cell(self) -> Cell:
        """What runs."""

    def ended(self) -> bool:
        """Whether the cell is over, however it ended; does not wait."""

    def result(self) -> Result:
        """The result of a cell that has ended, which is stored in its directory."""

    def cancel(self) -> None:
        """Ask the cell to end."""

    def join(self, timeout_s: float) -> None:
        """Wait for a cell that was cancelled, and end it by force if it takes longer."""


class Engine(Protocol):
    """Starts cells."""

    @property
    def slots(self) -> int:
        """Cells that can run at the same time."""

    def start(self, cell: Cell) -> Running:
        """Start a cell in an empty directory."""


def stop(runs: Sequence[Running]) -> None:
    """Stop cells, all at the same time; returns when they are gone."""
    for run in runs:
        run.cancel()
    deadline = time.monotonic() + _STOP_S
    for run in runs:
        run.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def open_engine(
    workers: Workers, *, child_command: Sequence[str] = CHILD_COMMAND
) -> Iterator[Engine]:
    """Open the engine that ``--workers`` names; every cell must have ended when it is closed.

    Args:
        workers: Processes at the same time, each with an equal share of the threads; or ``ray``.
        child_command: Replaces the process that runs a cell.

    Raises:
        InputError: Ray is not installed, or the cluster that was named does not answer.
    """
    if workers == "ray":
        with connected():
            yield RayEngine(child_command)
    else:
        with closing(ProcessEngine(workers, child_command)) as engine:
            yield engine
