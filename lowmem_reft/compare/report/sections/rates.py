"""Learning rates that were searched: the validation value at each, and which was taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.figures import new_figure
from lowmem_reft.compare.report.html import Chart, Column, Section, charts, html, shown, table
from lowmem_reft.compare.report.labels import Label, label_ends
from lowmem_reft.compare.report.rates import Trials, at_edge, chosen, remark
from lowmem_reft.compare.report.sections.curves import named_methods, validation_metric
from lowmem_reft.compare.report.table import METHOD
from lowmem_reft.data.tasks.metrics import unit_of
from lowmem_reft.machine.pages import INK

_NOTE = (
    "Each method was trained once with every rate and scored on validation rows alone; the best "
    "rate (ringed) was then taken for all seeds, and the test rows were read with it only. All "
    "methods had as many trials, at the same multiples of their own rates."
)


def render(comparison: Comparison) -> Section | None:
    """A chart for each task and a row for each method; nothing if no rate was searched."""
    found: dict[str, dict[str, Trials]] = {}
    for result in comparison.results:
        if result.get("lr_search"):
            of_task = found.setdefault(result["task"], {})
            of_task.setdefault(result["method"], result["lr_search"])
    if not found:
        return None
    drawn: dict[str, Chart] = {}
    for number, (task, of_method) in enumerate(found.items()):
        curves = {m: points for m, trials in of_method.items() if (points := _points(trials))}
        if curves:
            title = f"Validation value, {task}" if len(found) > 1 else "Validation value"
            name = f"learning_rates-{number}" if number else "learning_rates"
            drawn[name] = Chart(title, draw(comparison, task, curves))
    rows: list[dict[str, Any]] = [
        {"task": task, "method": method, "trials": trials}
        for task, of_method in found.items()
        for method, trials in of_method.items()
    ]
    columns = [
        *shown([METHOD, *comparison.task_column]),
        Column("learning rate", lambda row: _rate(row["trials"])),
        Column("validation", lambda row: _value(row["trials"])),
        Column("remark", lambda row: html.text(remark(row["trials"])), "text"),
        Column("tried", lambda row: html.text(_tried(row["trials"])), "text"),
    ]
    at_edges = dict.fromkeys(
        comparison.names[row["method"]] for row in rows if at_edge(row["trials"])
    )
    parts = []
    if at_edges:
        words = "Best at the edge of what was tried, so that a better rate may lie beyond it"
        parts.append(html.paragraph(f"{words}: {', '.join(at_edges)}."))
    if drawn:
        parts.append(charts(drawn))
    parts += [table(columns, rows, many="rows"), html.note(_NOTE)]
    title = "Learning rates"
    return Section(name="learning-rates", title=title, parts=parts, charts=drawn)


def _points(trials: Trials) -> list[tuple[float, float, bool]]:
    """(rate, value in its unit, whether it was taken) of the trials that ended, by rate."""
    return sorted(
        (trial["lr"], unit_of(trial.get("metric")).scale * trial["value"], trial["chosen"])
        for trial in trials
        if trial["value"] is not None
    )


def draw(
    comparison: Comparison, task: str, curves: Mapping[str, list[tuple[float, float, bool]]]
) -> Figure:
    """One line per method over the logarithm of the rate; the best and the reference are named."""
    figure, axes = new_figure()
    sign = unit_of(validation_metric(comparison, task)).sign
    names = named_methods(comparison, task, curves)
    ends = []
    for method, points in curves.items():
        rates, values, taken = zip(*points, strict=True)
        if method not in names:
            axes.plot(rates, values, color=INK, alpha=0.2, lw=1)
            continue
        color, marker = comparison.styles.get(method, (INK, "o"))
        axes.plot(rates, values, color=color, marker=marker, markersize=4, lw=1.5)
        ring: dict[str, Any] = {"mfc": "none", "mec": color, "mew": 1.5, "ms": 11, "ls": ""}
        for rate, value, is_taken in zip(rates, values, taken, strict=True):
            if is_taken:
                axes.plot([rate], [value], marker="o", **ring)
        ends.append(Label(names[method], rates[-1], values[-1]))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
    axes.set_xlabel("learning rate")
    metric = validation_metric(comparison, task)
    axes.set_ylabel(f"validation {metric or 'value'}{',' if sign else ''}{sign}")
    label_ends(axes, ends, INK)
    return figure


def _rate(trials: Trials) -> Any:
    best = chosen(trials)
    return html.number(None) if best is None else html.number(best["lr"], f"{best['lr']:g}")


def _value(trials: Trials) -> Any:
    best = chosen(trials)
    if best is None or best["value"] is None:
        return html.number(None)
    unit = unit_of(best.get("metric"))
    return html.number(unit.scale * best["value"], unit.text(best["value"]) + unit.sign)


def _tried(trials: Trials) -> str:
    """Each rate with its value."""
    if len(trials) == 1:
        return "–"
    values = (
        "failed" if trial["value"] is None else unit_of(trial.get("metric")).text(trial["value"])
        for trial in trials
    )
    return ", ".join(f"{t['lr']:g}: {value}" for t, value in zip(trials, values, strict=True))
