"""Cells in processes of this machine."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lowmem_reft.compare.cell import TRAINED_FILE, Cell, Result, training_key, write_cell
from lowmem_reft.compare.engines.forks import NURSERY_COMMAND, NoForkError, Nursery
from lowmem_reft.compare.engines.launch import (
    CHILD_COMMAND,
    Process,
    available_threads,
    cause_of_death,
    join_child,
    read_result,
    result_or_cause,
    start_child,
)
from lowmem_reft.machine.files import parse_json


class ProcessRun:
    """The process of one cell."""

    def __init__(self, cell: Cell, start: Callable[[Path], Process]) -> None:
        """Start it, by the path of its ``cell.json``."""
        self.cell = cell
        _clear(cell)
        path = write_cell(cell)
        self._start = time.perf_counter()
        self._process = start(path)

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._process.poll() is not None

    def result(self) -> Result:
        """The result that the process left, or one that says how it died."""
        code = self._process.returncode
        assert code is not None
        wall_time_s = time.perf_counter() - self._start
        return result_or_cause(self.cell, cause_of_death(code, self.cell.directory), wall_time_s)

    def cancel(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def join(self, timeout_s: float) -> None:
        """Wait until the process is gone."""
        join_child(self._process, timeout_s)


def _clear(cell: Cell) -> None:
    """Remove what an older configuration or a failed attempt left, which is not this run's.

    Only the training stays of a cell that has finished and is now scored on something else.
    """
    kept = cell.directory / "train" if _has_trained(cell) else None
    for path in cell.directory.glob("*"):
        if path.is_dir() and not path.is_symlink():
            if path != kept:
                shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _has_trained(cell: Cell) -> bool:
    result, directory = read_result(cell), cell.directory / "train"
    if cell.train is None or result is None or result["error"] is not None:
        return False
    if cell.train.run.output_dir != directory or not any(directory.glob("adapter/*.safetensors")):
        return False
    try:
        trained = parse_json((directory / TRAINED_FILE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(trained, dict) and trained.get("key") == training_key(cell)


class ProcessEngine:
    """A number of processes at the same time; each gets an equal share of the threads.

    Where that is safe they are forked from one that has imported all: on Linux without a card.
    """

    def __init__(self, workers: int, child_command: Sequence[str]) -> None:
        """Run ``workers`` processes of ``child_command``."""
        self.slots = workers
        self._command = child_command
        self._environment = dict(os.environ)
        if workers > 1:
            threads = max(1, available_threads() // workers)
            self._environment["OMP_NUM_THREADS"] = str(threads)
        self._may_fork = sys.platform == "linux" and tuple(child_command) == CHILD_COMMAND
        self._nursery: Nursery | None = None

    def start(self, cell: Cell) -> ProcessRun:
        """Start a cell."""
        may_fork = self._may_fork and not cell.evaluate.model.device.startswith("cuda")
        return ProcessRun(cell, self._fork if may_fork else self._spawn)

    def close(self) -> None:
        """End what cells are forked from."""
        if self._nursery is not None:
            self._nursery.close()

    def _fork(self, cell_path: Path) -> Process:
        if self._nursery is None:
            self._nursery = Nursery(self._environment, NURSERY_COMMAND)
        try:
            return self._nursery.start(cell_path)
        except NoForkError:
            self._may_fork = False
            return self._spawn(cell_path)

    def _spawn(self, cell_path: Path) -> Process:
        return start_child(self._command, cell_path, self._environment)
