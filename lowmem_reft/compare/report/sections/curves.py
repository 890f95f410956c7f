"""Training loss by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lowmem_reft.compare.report.comparison import Comparison, ranked
from lowmem_reft.compare.report.figures import Style, new_figure, short_number
from lowmem_reft.compare.report.html import Chart, Section, charts, html
from lowmem_reft.compare.report.labels import Label, label_ends
from lowmem_reft.machine.pages import INK

Losses = list[tuple[float, float]]
"""(step, loss) by step."""
_MAX_NAMES = 9
_LOG_FROM = 20
"""The axis is logarithmic if the largest loss is more than this times the smallest."""


def render(comparison: Comparison) -> Section | None:
    """One chart per task; one for all tasks that one training served."""
    groups: list[tuple[list[str], dict[str, Losses]]] = []
    for task in comparison.tasks:
        curves = mean_curves([r for r in comparison.results if r["task"] == task])
        same = next((tasks for tasks, known in groups if known == curves), None)
        if same is not None:
            same.append(task)
        elif curves:
            groups.append(([task], curves))
    if not groups:
        return None
    found: dict[str, Chart] = {}
    is_cut = False
    for number, (tasks, curves) in enumerate(groups):
        named = named_methods(comparison, tasks[0], curves)
        is_cut |= len(named) < len(curves)
        title = "Mean over seeds" if len(groups) == 1 else ", ".join(tasks)
        figure = draw(curves, comparison.styles, named)
        found[f"loss_curves-{number}" if number else "loss_curves"] = Chart(title, figure)
    parts = [charts(found)]
    if is_cut:
        words = f"Named: the {_MAX_NAMES - 1} best and the reference. Grey: all others."
        parts.append(html.note(words))
    return Section(name="curves", title="Training loss", parts=parts, charts=found)


def named_methods(comparison: Comparison, task: str, methods: Iterable[str]) -> dict[str, str]:
    """The methods that are named in a chart, and how: the best and the reference."""
    rows = ranked(comparison.rows_of(task))
    places = {row.method: i for i, row in enumerate(rows, 1) if row.method in methods}
    best = [method for method in places if method != comparison.reference]
    chosen = [*best[: _MAX_NAMES - 1], *(m for m in places if m == comparison.reference)]
    return {method: comparison.chart_name(method, places[method]) for method in chosen}


def mean_curves(results: Sequence[dict[str, Any]]) -> dict[str, Losses]:
    """Loss by step and method, averaged over the seeds that reported the step."""
    losses: dict[str, dict[float, list[float]]] = {}
    for result in results:
        for step, loss in result.get("loss_history") or []:
            if loss is not None:
                losses.setdefault(result["method"], {}).setdefault(step, []).append(loss)
    return {
        method: [(step, sum(values) / len(values)) for step, values in sorted(steps.items())]
        for method, steps in losses.items()
    }


def draw(
    curves: Mapping[str, Losses], styles: Mapping[str, Style], names: Mapping[str, str]
) -> Figure:
    """One line per method; those in ``names`` are named at their ends, the others are grey."""
    figure, axes = new_figure()
    ends = []
    for method, points in curves.items():
        steps, values = zip(*points, strict=True)
        if method not in names:
            axes.plot(steps, values, color=INK, alpha=0.2, lw=1)
            continue
        color, marker = styles.get(method, (INK, "o"))
        every = max(1, len(points) // 6)
        axes.plot(steps, values, color=color, marker=marker, markersize=4, markevery=every, lw=1.5)
        ends.append(Label(names[method], steps[-1], values[-1]))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, mean over seeds")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    losses = [loss for points in curves.values() for _, loss in points]
    if 0 < _LOG_FROM * min(losses) < max(losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(short_number))
    else:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0) if low < 0.25 * high else low, high)
    label_ends(axes, ends, INK)
    return figure
