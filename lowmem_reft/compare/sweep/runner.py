"""Trials in processes: started as there is room, followed while they run, stopped if pruned."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.engines import Engine, Running, open_engine, stop
from lowmem_reft.compare.queue import POLL_S, finished_result
from lowmem_reft.compare.sweep.search import Search, Trial, settings_of
from lowmem_reft.compare.sweep.space import with_settings
from lowmem_reft.data.tasks.metrics import gain
from lowmem_reft.machine.files import parse_json
from lowmem_reft.methods.entries import MethodSpec, parse_methods
from lowmem_reft.options import Workers


@dataclass(kw_only=True)
class Task:
    """The search of one method."""

    key: str
    """Digest of all that its trials depend on."""
    spec: MethodSpec
    """What is varied."""
    search: Search
    """Draws settings and judges trials."""
    trials: list[Trial]
    """Those that have ended, and those that are to run."""
    cell_of: Callable[[Sequence[MethodSpec]], Cell]
    """The cell of a setting."""


_MEASURED = ("metric", "num_examples", "num_trainable_params", "peak_bytes", "wall_time_s")
"""Of a cell's result and of its trial alike."""


class Observer(Protocol):
    """Told about every trial."""

    def started(self, cell: Cell) -> None:
        """The trial's process runs now."""

    def ended(self, trial: Trial, cell: Cell | None) -> None:
        """The trial is over; ``cell`` is None if nothing was started for it."""


@dataclass(kw_only=True)
class _Started:
    task: Task
    trial: Trial
    cell: Cell
    run: Running
    start: float
    same: list[Trial] = field(default_factory=list)
    """Trials with the same setting, drawn while this one runs."""


def run_trials(
    tasks: Sequence[Task],
    *,
    workers: Workers,
    child_command: Sequence[str],
    observer: Observer,
    save: Callable[[], object],
) -> None:
    """Run the trials that have not ended, one search after the other where there is room for one.

    ``save`` writes the trials down; it is called whenever one has changed.
    """
    waiting: deque[tuple[Task, Trial]] = deque()
    for task in tasks:
        for trial in task.trials:
            if trial.ended:
                task.search.restore(trial)
                observer.ended(trial, None)
            else:
                waiting.append((task, trial))
    if not waiting:
        return
    with open_engine(workers, child_command=child_command) as engine:
        runner = _Runner(engine, observer, save)
        try:
            while waiting or runner.running:
                while waiting and len(runner.running) < engine.slots:
                    runner.start(*waiting.popleft())
                time.sleep(POLL_S)
                for running in list(runner.running):
                    runner.follow(running)
        finally:
            stop([running.run for running in runner.running])


class _Runner:
    def __init__(self, engine: Engine, observer: Observer, save: Callable[[], object]) -> None:
        self.running: list[_Started] = []
        self._engine, self._observer, self._save = engine, observer, save

    def start(self, task: Task, trial: Trial) -> None:
        """Draw the trial's setting and run it, unless its outcome is known."""
        trial.drawn = task.search.draw(trial.number, trial.drawn)
        trial.settings = settings_of(trial.drawn)
        trial.method = with_settings(task.spec.label, trial.settings)
        trial.state = "running"
        same = [t for t in task.trials if t is not trial and t.method == trial.method]
        for running in self.running:
            if running.trial in same:
                running.same.append(trial)
                return
        for other in same:
            if other.ended:
                self._repeat(task, other, trial)
                return
        cell = task.cell_of(parse_methods(trial.method))
        result = finished_result(cell)
        if result is not None:
            self._judge(task, trial, _epochs(cell))
            self._end(task, trial, result, None)
            return
        self._observer.started(cell)
        run, start = self._engine.start(cell), time.perf_counter()
        self.running.append(_Started(task=task, trial=trial, cell=cell, run=run, start=start))
        self._save()

    def follow(self, running: _Started) -> None:
        """Take note of the epochs that are over, and of the end."""
        trial, over = running.trial, running.run.ended()  # before its last epochs are looked up
        lines = _epochs(running.cell)
        self._judge(running.task, trial, lines)
        if trial.state == "running" and not over:
            return
        self.running.remove(running)
        if over:
            result = running.run.result()
        else:
            stop([running.run])
            for checkpoint in (running.cell.directory / "train").glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            seconds = time.perf_counter() - running.start
            result = {"metric": lines[-1]["metric"], "wall_time_s": seconds}
        self._end(running.task, trial, result, running.cell)
        for other in running.same:
            self._repeat(running.task, trial, other)

    def _judge(self, task: Task, trial: Trial, lines: Sequence[dict[str, Any]]) -> None:
        """Report the epochs one by one, so that when they are looked at makes no difference."""
        for line in lines[len(trial.epochs) :]:
            if trial.state != "running":
                return
            if task.search.report(trial, line["value"]):
                trial.state = "pruned"

    def _end(self, task: Task, trial: Trial, result: Result, cell: Cell | None) -> None:
        for name in _MEASURED:
            setattr(trial, name, result.get(name))
        if trial.state == "pruned":
            known = (value for value in trial.epochs if value is not None)
            trial.value = max(known, key=partial(gain, trial.metric), default=None)
        elif result["error"] is not None:
            trial.state, trial.error = "failed", result["error"]
        elif result["value"] is None:
            trial.state, trial.error = "failed", f"{result['metric']} is not a number"
        else:
            trial.state, trial.value, trial.loss = "complete", result["value"], result["loss"]
        self._settle(task, trial, cell)

    def _repeat(self, task: Task, known: Trial, trial: Trial) -> None:
        """Give a trial the outcome of one with the same setting."""
        for value in known.epochs:
            task.search.report(trial, value)
        for name in ("state", "value", "loss", "error", *_MEASURED):
            setattr(trial, name, getattr(known, name))
        trial.wall_time_s = 0.0
        self._settle(task, trial, None)

    def _settle(self, task: Task, trial: Trial, cell: Cell | None) -> None:
        task.search.end(trial)
        self._save()
        self._observer.ended(trial, cell)


def _epochs(cell: Cell) -> list[dict[str, Any]]:
    """The lines of the epochs that are over; the last one may still be on its way."""
    path = Path(cell.directory, "train", "epochs.jsonl")
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [parse_json(line) for line in lines if line.endswith(b"\n")]
