"""What a training says of itself as it goes on: on standard error, nothing with ``--quiet``.

On a terminal there is one bar with the loss, the rate and the time that is left; elsewhere a line
with the same and the peak of memory so far for each report of the loss. Scores of validation rows
are lines in both.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from lowmem_reft.machine.progress import tell
from lowmem_reft.memory.live import peak_so_far_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowmem_reft.runs.spent import Spent


class Reports(TrainerCallback):
    """Says how far a training is; a context manager, so that no bar outlives it.

    Args:
        spent: Counts the seconds of the steps, by which their rate is told.
        quiet: Say nothing.
    """

    def __init__(self, spent: Spent, *, quiet: bool) -> None:
        self._spent, self._quiet = spent, quiet
        self._console = Console(
            stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=quiet
        )
        self._bar: Progress | None = None
        self._task: Any = None
        self._first_step, self._began, self._loss = 0, 0.0, ""

    def __enter__(self) -> Reports:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(line)

    def score(self, line: dict[str, Any], best: dict[str, Any]) -> None:
        """Say what validation rows scored: ``line`` and ``best`` as ``BestEpoch`` has them."""
        loss = line["loss"]
        known = loss is None or line["metric"] == "loss"
        self.say(
            f"epoch {line['epoch']:g} {line['metric']} {_figure(line['value'])}"
            + ("" if known else f" loss {_figure(loss)}")
            + f" best {_figure(best['value'])} (epoch {best['epoch']:g})"
        )

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take the bar away meanwhile, so that another one can be shown."""
        if self._bar is not None:
            self._bar.stop()
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.start()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self._first_step, self._began = state.global_step, time.perf_counter()
        if self._quiet or not self._console.is_terminal:
            return
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns,
            TextColumn("{task.fields[said]}", markup=False),
            console=self._console,
            transient=True,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, said=""
        )
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        tell("step", state.global_step, state.max_steps)
        if self._bar is not None:
            said = " ".join(part for part in (self._loss, self._rate(state)) if part)
            said += f", {self._left(state)} left"
            self._bar.update(self._task, completed=state.global_step, said=said)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Say the loss: a line, or beside the bar."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        self._loss = f"loss {logs['loss']:.4g}"
        if self._bar is None:
            rate = f"lr {logs['learning_rate']:.1e} {self._rate(state)}".rstrip()
            left = f", {self._left(state)} left" if state.global_step < state.max_steps else ""
            line = f"step {state.global_step}/{state.max_steps} {self._loss} {rate}"
            self.say(f"{line} peak {peak_so_far_bytes() / 2**30:.2f} GiB{left}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a line where the bar was."""
        if self._bar is not None:
            self.__exit__()
            line = f"step {state.global_step}/{state.max_steps} {self._loss} {self._rate(state)}"
            self.say(" ".join(line.split()))

    def _rate(self, state: Any) -> str:
        """Steps of this process, without what is between them."""
        steps, seconds = state.global_step - self._first_step, self._spent.time_s
        return f"{steps / seconds:.2g} steps/s" if steps and seconds else ""

    def _left(self, state: Any) -> str:
        """The time to the last step, with scoring and saving as they took so far."""
        seconds = time.perf_counter() - self._began
        steps = max(state.global_step - self._first_step, 1)
        left = round(seconds / steps * (state.max_steps - state.global_step))
        return f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
