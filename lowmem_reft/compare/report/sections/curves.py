"""Training loss by step, and validation scores by the time and the tokens that they took."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lowmem_reft.compare.report.comparison import Comparison, ranked
from lowmem_reft.compare.report.figures import Style, new_figure, short_number
from lowmem_reft.compare.report.html import Chart, Section, charts, html
from lowmem_reft.compare.report.labels import Label, label_ends
from lowmem_reft.data.tasks.metrics import unit_of
from lowmem_reft.machine.pages import INK

Points = list[tuple[float, float]]
"""(step, loss) by step, or (what was spent, score in its unit) by epoch."""
_MAX_NAMES = 9
_LOG_FROM = 20
"""The axis is logarithmic if the largest loss is more than this times the smallest."""


class _Axis(NamedTuple):
    """What validation scores are drawn against."""

    name: str
    """For file names: ``validation_vs_NAME``."""
    title: str
    field: str
    """Of an epoch."""
    label: str


_SPENT = (
    _Axis("time", "training time", "train_time_s", "training time without loading, s"),
    _Axis("tokens", "tokens", "num_computed_tokens", "tokens through the model, with padding"),
)


def render(comparison: Comparison) -> Section | None:
    """Charts for each task; once for all tasks that one training served."""
    groups: list[tuple[list[str], dict[str, Points]]] = []
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
    is_cut = is_scored = False
    for number, (tasks, curves) in enumerate(groups):
        named = named_methods(comparison, tasks[0], curves)
        is_cut |= len(named) < len(curves)
        suffix = f"-{number}" if number else ""
        where = "" if len(groups) == 1 else f", {', '.join(tasks)}"
        figure = draw(curves, comparison.styles, named)
        found[f"loss_curves{suffix}"] = Chart(f"Training loss{where}", figure)
        results = [r for r in comparison.results if r["task"] == tasks[0]]
        for axis in _SPENT:
            scores = mean_scores(results, axis.field)
            if scores:
                is_scored = True
                figure = draw_scores(comparison, tasks[0], scores, axis.label, named)
                title = f"Validation against {axis.title}{where}"
                found[f"validation_vs_{axis.name}{suffix}"] = Chart(title, figure)
    parts = [charts(found)]
    if is_scored:
        parts.append(html.note(_EXPLANATION))
    if is_cut:
        words = f"Named: the {_MAX_NAMES - 1} best and the reference. Grey: all others."
        parts.append(html.note(words))
    title = "Training loss and validation" if is_scored else "Training loss"
    return Section(name="curves", title=title, parts=parts, charts=found)


_EXPLANATION = (
    "Validation: a point per epoch, at what the training had spent by then (time without loading, "
    "scoring and building stores), means over seeds. Dotted: the best of the reference, which the "
    "columns to reference in All measurements are about."
)


def named_methods(comparison: Comparison, task: str, methods: Iterable[str]) -> dict[str, str]:
    """The methods that are named in a chart, and how: the best and the reference."""
    rows = ranked(comparison.rows_of(task))
    places = {row.method: i for i, row in enumerate(rows, 1) if row.method in methods}
    best = [method for method in places if method != comparison.reference]
    chosen = [*best[: _MAX_NAMES - 1], *(m for m in places if m == comparison.reference)]
    return {method: comparison.chart_name(method, places[method]) for method in chosen}


def mean_curves(results: Sequence[dict[str, Any]]) -> dict[str, Points]:
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


def mean_scores(results: Sequence[dict[str, Any]], field: str) -> dict[str, Points]:
    """Validation score in its unit by what was spent and method, both means over seeds.

    An epoch counts if every seed that is there scored it and says what it had spent.
    """
    found: dict[str, dict[float, list[tuple[float, float]]]] = {}
    seeds: dict[str, int] = {}
    for result in results:
        lines = result.get("validation") or []
        seeds[result["method"]] = seeds.get(result["method"], 0) + bool(lines)
        for line in lines:
            if line["value"] is not None and line.get(field) is not None:
                epochs = found.setdefault(result["method"], {})
                value = unit_of(line.get("metric")).scale * line["value"]
                epochs.setdefault(line["epoch"], []).append((line[field], value))
    means = {
        method: [
            (fmean(x for x, _ in points), fmean(y for _, y in points))
            for _, points in sorted(epochs.items())
            if len(points) == seeds[method]
        ]
        for method, epochs in found.items()
    }
    return {method: points for method, points in means.items() if points}


def validation_metric(comparison: Comparison, task: str) -> str | None:
    """The metric of a task's validation rows; None if there are no scores of them."""
    lines = (r.get("validation") for r in comparison.results if r["task"] == task)
    return next((line.get("metric") for some in lines for line in some or ()), None)


def draw_scores(
    comparison: Comparison,
    task: str,
    curves: Mapping[str, Points],
    label: str,
    names: Mapping[str, str],
) -> Figure:
    """One line per method, as in ``draw``, and a dotted one where the reference's best is."""
    rows = comparison.rows_of(task)
    metric = validation_metric(comparison, task)
    unit = unit_of(metric)
    figure, axes = new_figure()
    ends = _lines(axes, curves, comparison.styles, names)
    target = next((row.reference_value for row in rows if row.reference_value is not None), None)
    if target is not None:
        axes.axhline(unit.scale * target, color=INK, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
    axes.set_xlabel(label)
    axes.set_ylabel(f"validation {metric or 'value'}{',' if unit.sign else ''}{unit.sign}")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    label_ends(axes, ends, INK)
    return figure


def draw(
    curves: Mapping[str, Points], styles: Mapping[str, Style], names: Mapping[str, str]
) -> Figure:
    """One line per method; those in ``names`` are named at their ends, the others are grey."""
    figure, axes = new_figure()
    ends = _lines(axes, curves, styles, names)
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


def _lines(
    axes: Axes, curves: Mapping[str, Points], styles: Mapping[str, Style], names: Mapping[str, str]
) -> list[Label]:
    """Draw the lines and return the names at their ends."""
    ends = []
    for method, points in curves.items():
        x, y = zip(*points, strict=True)
        if method not in names:
            axes.plot(x, y, color=INK, alpha=0.2, lw=1)
            continue
        color, marker = styles.get(method, (INK, "o"))
        every = max(1, len(points) // 6)
        axes.plot(x, y, color=color, marker=marker, markersize=4, markevery=every, lw=1.5)
        ends.append(Label(names[method], x[-1], y[-1]))
    return ends
