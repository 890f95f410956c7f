"""Cells in processes of this machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence

from lowmem_reft.compare.cell import Cell, Result, write_cell
from lowmem_reft.compare.engines.launch import (
    available_threads,
    cause_of_death,
    join_child,
    result_or_cause,
    start_child,
)


class ProcessRun:
    """The process of one cell."""

    def __init__(self, cell: Cell, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start it."""
        self.cell = cell
        # What an older configuration or a failed attempt left must not be mistaken for this run's.
        shutil.rmtree(cell.directory, ignore_errors=True)
        path = write_cell(cell)
        self._start = time.perf_counter()
        self._process = start_child(command, path, environment)

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def result(self) -> Result:
        """The result that the process left, or one that says how it died."""
        code = self._process.returncode
        wall_time_s = time.perf_counter() - self._start
        return result_or_cause(self.cell, cause_of_death(code, self.cell.directory), wall_time_s)

    def cancel(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def join(self, timeout_s: float) -> None:
        """Wait until the process is gone."""
        join_child(self._process, timeout_s)


class ProcessEngine:
    """A number of processes at the same time; each gets an equal share of the threads."""

    def __init__(self, workers: int, child_command: Sequence[str]) -> None:
        """Run ``workers`` processes of ``child_command``."""
        self.slots = workers
        self._command = child_command
        self._environment = dict(os.environ)
        if workers > 1:
            threads = max(1, available_threads() // workers)
            self._environment["OMP_NUM_THREADS"] = str(threads)

    def start(self, cell: Cell) -> ProcessRun:
        """Start a cell."""
        return ProcessRun(cell, self._command, self._environment)
