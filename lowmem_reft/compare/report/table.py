"""From cells to rows: mean and standard deviation over seeds, and how each number is written."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowmem_reft.data.tasks.metrics import Unit, is_lower_better, unit_of


@dataclass(frozen=True, kw_only=True)
class Summary:
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
    real_percent: float | None
    """Of the tokens that were computed those of rows, the others being padding; mean, too."""
    forgetting: float | None
    """Rise of the loss on general text over the base's, nats per token; mean over the seeds."""
    reference_value: float | None
    """The validation score that the reference reaches; None where there is nothing to compare."""
    time_to_reference_s: float | None
    """Until that score was reached; the median over the seeds, as are the next two, where a seed
    that never reached it took longer than all. None: not reached."""
    steps_to_reference: float | None
    tokens_to_reference: float | None


@dataclass(frozen=True)
class Measure:
    """What a column shows of a summary, or of a cell, which is a dictionary."""

    title: str
    field: str
    scale: float = 1.0
    digits: int = 0
    kind: Literal["text", "number", "metric"] = "number"
    """Or the value of the item's metric, which has a unit of its own."""

    def value(self, item: Any) -> Any:
        """As it was measured; None where it was not."""
        return item.get(self.field) if isinstance(item, dict) else getattr(item, self.field, None)

    def number(self, item: Any) -> float | None:
        """The value in the unit of the heading, for sorting."""
        value = self.value(item)
        return (
            None if value is None or self.kind == "text" else float(value) * self._unit(item).scale
        )

    def _unit(self, item: Any) -> Unit:
        if self.kind != "metric":
            return Unit(self.scale, self.digits, "")
        return unit_of(item["metric"] if isinstance(item, dict) else item.metric)

    def text(self, item: Any) -> str:
        """The value as it is shown; a dash where there is none."""
        if self.kind == "text":
            return str(self.value(item))
        number = self.number(item)
        if self.field == "value" and item["error"] is not None:
            return "failed"
        if number is None:
            if self.field in TO_REFERENCE and _REACHED.value(item) is not None:
                return "not reached"
            return "failed" if self.field == "value_mean" and item.errors else "–"
        unit = self._unit(item)
        text = f"{number:,.{unit.digits}f}"
        if self.field == "value_mean" and item.value_sd is not None:
            text += f" ± {unit.text(item.value_sd)}"
        return text


ALL_TASKS = "all tasks"
"""What the rows of means over tasks have as their task."""
METHOD = Measure("method", "method", kind="text")
TASK = Measure("task", "task", kind="text")
_MEASURES = (
    Measure("eval loss", "loss", 1.0, 3),
    Measure("trainable", "num_trainable_params"),
    Measure("trainable %", "trainable_percent", 1.0, 3),
    Measure("adapter KiB", "adapter_bytes", 2**-10, 1),
    Measure("peak MiB", "peak_bytes", 2**-20, 1),
    Measure("reserved MiB", "reserved_bytes", 2**-20, 1),
    Measure("RSS MiB", "rss_bytes", 2**-20),
    Measure("step ms", "step_time_s", 1e3, 1),
    Measure("train s", "train_time_s", 1.0, 1),
    Measure("build s", "build_time_s", 1.0, 1),
    Measure("tokens/s", "tokens_per_s"),
    Measure("real tokens %", "real_percent", 1.0, 1),
    Measure("forgetting", "forgetting", 1.0, 3),
    Measure("s to reference", "time_to_reference_s", 1.0, 1),
    Measure("steps to reference", "steps_to_reference"),
    Measure("tokens to reference", "tokens_to_reference"),
)
TO_REFERENCE = ("time_to_reference_s", "steps_to_reference", "tokens_to_reference")
_REACHED = Measure("", "reference_value")
_LARGEST = ("num_trainable_params", "adapter_bytes", "peak_bytes", "reserved_bytes", "rss_bytes")
_MEANS = (
    "loss",
    "trainable_percent",
    "step_time_s",
    "train_time_s",
    "wall_time_s",
    "tokens_per_s",
    "real_percent",
    "forgetting",
    "reference_value",
)


def aggregate(results: Iterable[dict[str, Any]]) -> list[Summary]:
    """One row per method and task, in the order in which they first occur."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["method"], result["task"]), []).append(result)
    return [_summary(method, task, cells) for (method, task), cells in groups.items()]


def over_tasks(results: Sequence[dict[str, Any]]) -> list[Summary]:
    """One row per method over all tasks; the deviation is that of the seeds' means over tasks.

    The loss has no mean with shares and correlations: where there are such, its tasks do not count.
    Values and times are means over the tasks, sizes their largest. Seeds that did not finish every
    task do not count; a method without any other has no row.
    """
    if any(not is_lower_better(result["metric"]) for result in results if result["metric"]):
        losses = {r["task"] for r in results if is_lower_better(r["metric"])}
        results = [result for result in results if result["task"] not in losses]
    tasks = dict.fromkeys(result["task"] for result in results)
    runs: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for result in results:
        if result["error"] is None and result["value"] is not None:
            runs.setdefault((result["method"], result["seed"]), {})[result["task"]] = result
    return aggregate(
        _mean_cell(list(run.values())) for run in runs.values() if len(run) == len(tasks)
    )


def measured(measures: Iterable[Measure], items: Sequence[Any]) -> list[Measure]:
    """The measures that some item has."""
    return [each for each in measures if any(each.value(item) is not None for item in items)]


def columns(rows: Sequence[Summary]) -> list[Measure]:
    """The columns that say something here: no task if there is one, no reserved memory on a CPU."""
    metrics = {row.metric for row in rows if row.metric}
    metric = metrics.pop() if len(metrics) == 1 else "value"
    several = len({row.task for row in rows}) > 1
    value = Measure(titled(metric, (row.metric for row in rows)), "value_mean", kind="metric")
    # The loss is not shown twice.
    others = [each for each in _MEASURES if each.field != "loss" or metric != "loss"]
    return [METHOD, *([TASK] if several else []), value, *measured(others, rows)]


def titled(name: str, metrics: Iterable[str | None]) -> str:
    """The heading of values of these metrics: with the sign of their unit."""
    signs = {unit_of(metric).sign for metric in metrics if metric} or {unit_of(None).sign}
    return name + (signs.pop() if len(signs) == 1 else ", % or nats")


def markdown(rows: Sequence[Summary]) -> str:
    """The table for a README; a failed row names its error."""
    shown = columns(rows)
    lines = [
        "| " + " | ".join(column.title for column in shown) + " |",
        "|" + "|".join(":--" if column.kind == "text" else "--:" for column in shown) + "|",
    ]
    for row in rows:
        words = [column.text(row) for column in shown]
        if row.errors and not row.num_seeds:
            words[[column.field for column in shown].index("value_mean")] = _reason(row.errors[0])
        lines.append("| " + " | ".join(word.replace("|", r"\|") for word in words) + " |")
    return "\n".join(lines) + "\n"


def _reason(error: str) -> str:
    """A refusal says why in words that need no seed and no name of an exception."""
    seeds, _, said = error.partition(": ")
    refusal = said.removeprefix("InputError: ")
    return f"failed: {seeds}: {said}" if refusal == said else f"refused: {refusal}"


def _mean_cell(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The cells of one method and seed, one per task, as if they were one cell."""
    metrics = {cell["metric"] for cell in cells}
    mean = {**cells[0], "task": ALL_TASKS}
    mean["metric"] = metrics.pop() if len(metrics) == 1 else "mean"
    averaged = ("value", *_MEANS, *TO_REFERENCE)
    for name in (*averaged, *_LARGEST, "build_time_s"):
        merge = statistics.fmean if name in averaged else max
        found = [cell[name] for cell in cells if cell.get(name) is not None]
        mean[name] = merge(found) if len(found) == len(cells) else None
    return mean


def _summary(method: str, task: str, cells: Sequence[dict[str, Any]]) -> Summary:
    finished = [cell for cell in cells if cell["error"] is None]
    failed: dict[str, list[str]] = {}
    for cell in cells:
        if cell["error"] is not None:
            failed.setdefault(cell["error"], []).append(str(cell["seed"]))

    def numbers(name: str) -> list[float]:
        values = (cell.get(name) for cell in finished)
        return [v for v in values if v is not None and math.isfinite(v)]

    def median(name: str) -> float | None:
        reached = numbers(name)
        never = len(numbers("reference_value")) - len(reached)
        found = statistics.median([*reached, *[math.inf] * never]) if reached else math.inf
        return found if math.isfinite(found) else None

    values = numbers("value")
    merged: dict[str, Any] = {
        **{name: statistics.fmean(found) if (found := numbers(name)) else None for name in _MEANS},
        **{name: int(max(found)) if (found := numbers(name)) else None for name in _LARGEST},
        **{name: median(name) for name in TO_REFERENCE},
    }
    return Summary(
        method=method,
        task=task,
        metric=finished[0]["metric"] if finished else None,
        num_seeds=len(finished),
        errors=[f"seed {', '.join(seeds)}: {error}" for error, seeds in failed.items()],
        value_mean=statistics.fmean(values) if values else None,
        value_sd=statistics.stdev(values) if len(values) > 1 else None,
        build_time_s=max(numbers("build_time_s"), default=0.0) or None,
        **merged,
    )
