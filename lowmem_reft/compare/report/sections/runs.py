"""Every run, with the command that repeats it."""

from __future__ import annotations

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.html import Column, Section, html, shown, table
from lowmem_reft.compare.report.table import METHOD, Measure, measured, titled

_MEASURES = (
    Measure("best epoch", "best_epoch"),
    Measure("eval loss", "loss", 1.0, 3),
    Measure("peak MiB", "peak_bytes", 2**-20, 1),
    Measure("train s", "train_time_s"),
    Measure("wall s", "wall_time_s"),
)


def render(comparison: Comparison) -> Section:
    """One row per cell; many rows are folded away."""
    metrics = [result["metric"] for result in comparison.results]
    values = [
        Measure(titled(name, metrics), field, kind="metric")
        for name, field in (("value", "value"), ("validation", "validation_value"))
    ]
    columns = [
        *shown([METHOD, *comparison.task_column]),
        Column("seed", lambda result: html.number(result["seed"], str(result["seed"]))),
        *shown(measured([*values, *_MEASURES], comparison.results)),
        Column("how to repeat it", lambda result: html.command(str(result["command"])), "text"),
    ]
    body = table(columns, comparison.results, many="runs")
    return Section(name="runs", title="Every run", parts=[body])
