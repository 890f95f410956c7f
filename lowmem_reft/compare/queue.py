"""Cells in a row or at the same time: finished ones skipped, failed ones turned into rows.

The parent never loads a model. It has an engine (``engines/``) start the cells, each in a process
of its own, and reads the ``result.json`` that is there when the process has ended, however it ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.engines import Running, open_engine, stop
from lowmem_reft.compare.engines.launch import CHILD_COMMAND, read_result
from lowmem_reft.options import Workers

POLL_S = 0.1
"""Between two looks at what is running."""


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
    workers: Workers = 1,
    child_command: Sequence[str] = CHILD_COMMAND,
) -> list[Result]:
    """Run the cells that have no result yet and return all results, in the order of ``cells``.

    A cell is finished if its ``result.json`` has no error and the same key (config and digests). If
    this process is interrupted, the running cells are stopped; those that have finished stay.
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
    if waiting:
        _run_all(waiting, results, observer, workers, child_command)
    return [results[cell.directory] for cell in cells]


def _run_all(
    waiting: deque[Cell],
    results: dict[Path, Result],
    observer: Observer,
    workers: Workers,
    child_command: Sequence[str],
) -> None:
    running: list[Running] = []
    with open_engine(workers, child_command=child_command) as engine:
        try:
            while waiting or running:
                while waiting and len(running) < engine.slots:
                    observer.started(waiting[0])
                    running.append(engine.start(waiting.popleft()))
                time.sleep(POLL_S)
                for run in [run for run in running if run.ended()]:
                    running.remove(run)
                    results[run.cell.directory] = run.result()
                    observer.finished(run.cell, results[run.cell.directory], skipped=False)
        finally:
            stop(running)


def finished_result(cell: Cell) -> Result | None:
    """The stored result of a cell that finished with the same key; None if it has to run."""
    result = read_result(cell)
    if result is None or result.get("error") is not None:
        return None
    return result if result.get("key") == cell.record["key"] else None
