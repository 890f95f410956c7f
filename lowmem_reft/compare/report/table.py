"""From cells to rows: mean and standard deviation over seeds, and how each number is written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method on one task; None where nothing was measured (the base has no training)."""

    method: str
    task: str
    metric: str | None
    num_seeds: int
    """Seeds that finished; the means are over these."""
    errors: list[str]
    """One line per reason, with the seeds that failed for it."""
    value_mean: float | None
    value_sd: float | None
    """Sample standard deviation (n - 1); None for fewer than two seeds."""
    loss: float | None
    """Mean evaluation loss."""
    num_trainable_params: int | None
    trainable_percent: float | None
    adapter_bytes: int | None
    peak_bytes: int | None
    """Largest over the seeds, as are the next two: what the machine must have."""
    reserved_bytes: int | None
    rss_bytes: int | None
    step_time_s: float | None
    train_time_s: float | None
    """Of the training without loading; mean over the seeds, as is the next."""
    wall_time_s: float | None
    """Of the whole run, loading and scoring included."""
    build_time_s: float | None
    """Longest over the seeds: others find the store that the first one built. None without one."""
    tokens_per_s: float | None


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading and how a row fills it."""

    title: str
    field: str
    """Field of ``Row``."""
    scale: float = 1.0
    digits: int = 0
    kind: Literal["text", "number"] = "number"

    def number(self, row: Row) -> float | None:
        """The row's value in the unit of the heading, for sorting."""
        value = getattr(row, self.field)
        return None if value is None or self.kind == "text" else float(value) * self.scale

    def text(self, row: Row) -> str:
        """The row's value as it is shown; a dash where there is none."""
        if self.kind == "text":
            return str(getattr(row, self.field))
        number = self.number(row)
        if number is None:
            return "failed" if self.field == "value_mean" and row.errors else "–"
        text = f"{number:,.{self.digits}f}"
        if self.field == "value_mean" and row.value_sd is not None:
            text += f" ± {row.value_sd * self.scale:.{self.digits}f}"
        return text


_COLUMNS = (
    Column("method", "method", kind="text"),
    Column("task", "task", kind="text"),
    Column("{metric} %", "value_mean", 100.0, 1),
    Column("eval loss", "loss", 1.0, 3),
    Column("trainable", "num_trainable_params"),
    Column("trainable %", "trainable_percent", 1.0, 3),
    Column("adapter KiB", "adapter_bytes", 2**-10, 1),
    Column("peak MiB", "peak_bytes", 2**-20, 1),
    Column("reserved MiB", "reserved_bytes", 2**-20, 1),
    Column("RSS MiB", "rss_bytes", 2**-20),
    Column("step ms", "step_time_s", 1e3, 1),
    Column("train s", "train_time_s", 1.0, 1),
    Column("build s", "build_time_s", 1.0, 1),
    Column("tokens/s", "tokens_per_s"),
)

_LARGEST_FIELDS = (
    "num_trainable_params",
    "adapter_bytes",
    "peak_bytes",
    "reserved_bytes",
    "rss_bytes",
    "build_time_s",
)
_MEAN_FIELDS = (
    "value",
    "loss",
    "trainable_percent",
    "step_time_s",
    "train_time_s",
    "wall_time_s",
    "tokens_per_s",
)


def aggregate(results: Iterable[dict[str, Any]]) -> list[Row]:
    """One row per method and task, in the order in which they first occur."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["task"]), []).append(result)
    return [_row(method, task, cells) for (method, task), cells in groups.items()]


def over_tasks(results: Sequence[dict[str, Any]]) -> list[Row]:
    """One row per method over all tasks; the deviation is that of the seeds' means over tasks.

    Values and times are means over the tasks, sizes their largest. Seeds that did not finish every
    task do not count; a method without any other has no row.
    """
    tasks = dict.fromkeys(result["task"] for result in results)
    runs: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for result in results:
        if result["error"] is None and result["value"] is not None:
            runs.setdefault((result["method"], result["seed"]), {})[result["task"]] = result
    return aggregate(
        _mean_cell(list(run.values())) for run in runs.values() if len(run) == len(tasks)
    )


def columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that say something here: no task if there is one, no reserved memory on a CPU."""
    metrics = {row.metric for row in rows if row.metric}
    metric = metrics.pop() if len(metrics) == 1 else "value"
    shown = []
    for column in _COLUMNS:
        if column.field == "task":
            keep = len({row.task for row in rows}) > 1
        else:
            keep = any(getattr(row, column.field) is not None for row in rows)
        if keep or column.field == "value_mean":
            title = column.title.format(metric=metric)
            shown.append(Column(title, column.field, column.scale, column.digits, column.kind))
    return shown


def markdown(rows: Sequence[Row]) -> str:
    """The table for a README; a failed row names its error."""
    shown = columns(rows)
    lines = [
        "| " + " | ".join(column.title for column in shown) + " |",
        "|" + "|".join(":--" if column.kind == "text" else "--:" for column in shown) + "|",
    ]
    for row in rows:
        words = [column.text(row) for column in shown]
        if row.errors and not row.num_seeds:
            place = next(i for i, column in enumerate(shown) if column.field == "value_mean")
            words[place] = _reason(row.errors[0])
        lines.append("| " + " | ".join(word.replace("|", r"\|") for word in words) + " |")
    return "\n".join(lines) + "\n"


def _mean_cell(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cells of one method and seed, one per task, as if they were one cell."""
    metrics = {cell["metric"] for cell in cells}
    mean = {**cells[0], "task": "all tasks"}
    mean["metric"] = metrics.pop() if len(metrics) == 1 else "mean"
    for fields, merge in ((_MEAN_FIELDS, statistics.fmean), (_LARGEST_FIELDS, max)):
        for field in fields:
            found = [cell[field] for cell in cells if cell.get(field) is not None]
            mean[field] = merge(found) if len(found) == len(cells) else None
    return mean


def _reason(error: str) -> str:
    """A refusal says why in words that need no seed and no name of an exception."""
    seeds, _, said = error.partition(": ")
    refusal = said.removeprefix("InputError: ")
    return f"failed: {seeds}: {said}" if refusal == said else f"refused: {refusal}"


def _row(method: str, task: str, cells: Sequence[dict[str, Any]]) -> Row:
    finished = [cell for cell in cells if cell["error"] is None]
    failed: dict[str, list[str]] = {}
    for cell in cells:
        if cell["error"] is not None:
            failed.setdefault(cell["error"], []).append(str(cell["seed"]))

    def numbers(field: str) -> list[float]:
        values = (cell.get(field) for cell in finished)
        return [v for v in values if v is not None and math.isfinite(v)]

    def mean(field: str) -> float | None:
        return statistics.fmean(numbers(field)) if numbers(field) else None

    def largest(field: str) -> int | None:
        return int(max(numbers(field))) if numbers(field) else None

    values = numbers("value")
    return Row(
        method=method,
        task=task,
        metric=finished[0]["metric"] if finished else None,
        num_seeds=len(finished),
        errors=[f"seed {', '.join(seeds)}: {error}" for error, seeds in failed.items()],
        value_mean=mean("value"),
        value_sd=statistics.stdev(values) if len(values) > 1 else None,
        loss=mean("loss"),
        num_trainable_params=largest("num_trainable_params"),
        trainable_percent=mean("trainable_percent"),
        adapter_bytes=largest("adapter_bytes"),
        peak_bytes=largest("peak_bytes"),
        reserved_bytes=largest("reserved_bytes"),
        rss_bytes=largest("rss_bytes"),
        step_time_s=mean("step_time_s"),
        train_time_s=mean("train_time_s"),
        wall_time_s=mean("wall_time_s"),
        build_time_s=max(numbers("build_time_s"), default=0.0) or None,
        tokens_per_s=mean("tokens_per_s"),
    )
