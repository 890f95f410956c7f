"""``lowmem-reft tasks``: what tasks there are, and how many rows of each a directory holds."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from lowmem_reft.data.tasks.metrics import METRICS
from lowmem_reft.data.tasks.registry import summary
from lowmem_reft.data.tasks.task import SPLITS
from lowmem_reft.options import TasksOptions


def run_tasks(options: TasksOptions) -> dict[str, Any]:
    """List the tasks; print them on standard output unless they are wanted as JSON.

    Returns:
        ``tasks`` (see ``registry.summary``) and ``metrics``, each with a line about it.

    Raises:
        InputError: The directory is not there.
    """
    tasks = summary(options.data_dir)
    if not options.json:
        _print(tasks, with_rows=options.data_dir is not None)
    return {
        "tasks": tasks,
        "metrics": {name: metric.about for name, metric in METRICS.items()},
    }


def _print(tasks: list[dict[str, Any]], *, with_rows: bool) -> None:
    table = Table(box=None, pad_edge=False)
    last = SPLITS if with_rows else ("about",)
    for title in ("task", "family", "metric", "scored by", *last):
        table.add_column(title, justify="right" if title in SPLITS else "left")
    for task in tasks:
        rows = task.get("rows", {})
        cells = [f"{rows[split]:,}" if split in rows else "-" for split in SPLITS]
        if "error" in task:
            cells = [task["error"]]
        table.add_row(
            task["name"],
            task["family"],
            task["metric"],
            task["scoring"],
            *(cells if with_rows else [task["about"]]),
        )
    Console(soft_wrap=True).print(table, markup=False)
