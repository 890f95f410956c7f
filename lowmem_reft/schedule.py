"""Cells in processes: so many at a time, finished ones skipped, failed ones turned into rows.

The parent never loads a model. It starts ``python -m lowmem_reft.cell`` for each cell, with the
output in the cell's ``log.txt``, and reads ``result.json`` when the process ends, however it ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lowmem_reft.cell import Cell, Result, failed_result, write_cell, write_json

CHILD_COMMAND = (sys.executable, "-m", "lowmem_reft.cell")
"""What runs one cell; the path of its ``cell.json`` is appended."""

_POLL_S = 0.1
_STOP_S = 5.0


class Observer(Protocol):
    """Told about every cell; draws progress, writes intermediate results."""

    def started(self, cell: Cell) -> None:
        """The cell's process runs now."""

    def finished(self, cell: Cell, result: Result, *, skipped: bool) -> None:
        """The cell has a result; ``skipped``: it had it before."""


def run_cells(
    cells: Sequence[Cell],
    *,
    observer: Observer,
    workers: int = 1,
    child_command: Sequence[str] = CHILD_COMMAND,
) -> list[Result]:
    """Run the cells that have no result yet and return all results, in the order of ``cells``.

    A cell is finished if its ``result.json`` has no error and the same key (config and digests). If
    this process is interrupted, the running cells are stopped; those that have finished stay.

    Args:
        cells: What to run.
        observer: Told when a cell starts and ends.
        workers: Processes at the same time; each gets an equal share of the threads.
        child_command: Replaces the process that runs a cell (for tests and other engines).
    """
    results: dict[Path, Result] = {}
    waiting: deque[Cell] = deque()
    for cell in cells:
        result = finished_result(cell)
        if result is None:
            waiting.append(cell)
        else:
            results[cell.directory] = result
            observer.finished(cell, result, skipped=True)
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                observer.started(waiting[0])
                running.append(_Child(waiting.popleft(), child_command, workers))
            time.sleep(_POLL_S)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                results[child.cell.directory] = child.result()
                observer.finished(child.cell, results[child.cell.directory], skipped=False)
    finally:
        _stop(running)
    return [results[cell.directory] for cell in cells]


def finished_result(cell: Cell) -> Result | None:
    """The stored result of a cell that finished with the same key; None if it has to run."""
    result = _read_result(cell)
    if result is None or result.get("error") is not None:
        return None
    return result if result.get("key") == cell.record["key"] else None


class _Child:
    """The process of one cell."""

    def __init__(self, cell: Cell, command: Sequence[str], workers: int) -> None:
        self.cell = cell
        self.log_path = cell.directory / "log.txt"
        # What an older configuration or a failed attempt left must not be mistaken for this run's.
        shutil.rmtree(cell.directory, ignore_errors=True)
        path = write_cell(cell)
        environment = dict(os.environ)
        if workers > 1:
            environment["OMP_NUM_THREADS"] = str(_threads_per_worker(workers))
        self.start = time.perf_counter()
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(path)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def result(self) -> Result:
        """The result that the process left, or one that says how it died, which is stored here."""
        result = _read_result(self.cell)
        if result is None:
            wall_time_s = time.perf_counter() - self.start
            result = failed_result(self.cell, self._cause_of_death(), wall_time_s)
            write_json(self.cell.result_path, result)
        return result

    def _cause_of_death(self) -> str:
        code = self.process.returncode
        if code < 0:
            hint = "; out of memory?" if -code == signal.SIGKILL else ""
            return f"killed by signal {-code} ({signal.strsignal(-code)}){hint}"
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        return f"ended with exit code {code} and no result: {last}"


def _read_result(cell: Cell) -> Result | None:
    try:
        result = json.loads(cell.result_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def _threads_per_worker(workers: int) -> int:
    """Share of the threads that OMP_NUM_THREADS grants, else of the cores this process may use."""
    granted = os.environ.get("OMP_NUM_THREADS", "")
    if granted.isdecimal():
        threads = int(granted)
    elif hasattr(os, "sched_getaffinity"):
        threads = len(os.sched_getaffinity(0))
    else:
        threads = os.cpu_count() or 1
    return max(1, threads // workers)


def _stop(children: Sequence[_Child]) -> None:
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + _STOP_S
    for child in children:
        try:
            child.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
