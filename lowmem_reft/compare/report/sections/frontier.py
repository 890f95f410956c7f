"""Quality against cost: parameters, memory, time and forgetting, with what nothing beats."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lowmem_reft.compare.report.comparison import MAX_NAME, Comparison, ranked
from lowmem_reft.compare.report.figures import new_figure, short_number
from lowmem_reft.compare.report.html import Chart, Section, charts, folded, html
from lowmem_reft.compare.report.labels import Label, place_labels
from lowmem_reft.compare.report.table import Summary
from lowmem_reft.data.tasks.metrics import gain, is_lower_better, unit_of
from lowmem_reft.machine.pages import INK

_MAX_NAMES = 9


class Cost(NamedTuple):
    """What a chart sets the quality against."""

    name: str
    """For file names: ``accuracy_vs_NAME``."""
    title: str
    label: str
    """Of the axis."""
    field: str
    """Of a summary."""
    unit: float = 1.0

    def of(self, row: Summary) -> float:
        """The cost in the axis' unit."""
        return float(getattr(row, self.field)) / self.unit

    def is_known(self, row: Summary) -> bool:
        """Whether it was measured of a method that trains something."""
        return bool(row.num_trainable_params) and getattr(row, self.field) is not None


_PARAMETERS = Cost(
    "parameters", "trainable parameters", "trainable parameters", "num_trainable_params"
)
_MEMORY = Cost("memory", "peak memory", "peak memory in training, MiB", "peak_bytes", 2.0**20)
_TRAIN_TIME = Cost("time", "training time", "training time without loading, s", "train_time_s")
_WALL_TIME = Cost(
    "time",
    "time of the run",
    "time of the run, loading and scoring included, s",
    "wall_time_s",
)
_FORGETTING = Cost(
    "forgetting",
    "forgetting",
    "rise of the loss on general text, nats per token",
    "forgetting",
)


def render(comparison: Comparison) -> Section | None:
    """Charts of the mean over tasks, or of the only task; those of each task below."""
    groups = [("", comparison.mean_rows)] if comparison.mean_rows else []
    groups += [(task, comparison.rows_of(task)) for task in comparison.tasks]
    found: dict[str, Chart] = {}
    parts = []
    for number, (task, rows) in enumerate(groups):
        drawn = draw(comparison, rows)
        if number:
            pairs = drawn.items()
            drawn = {f"{k}-{number}": Chart(f"{c.title}, {task}", c.figure) for k, c in pairs}
        if drawn:
            parts.append(folded(task, charts(drawn)) if number else charts(drawn))
        found |= drawn
    if not found:
        return None
    parts.insert(1, html.note(_explanation(comparison)))
    return Section(name="frontier", title="Quality against cost", parts=parts, charts=found)


def draw(comparison: Comparison, rows: Sequence[Summary]) -> dict[str, Chart]:
    """A chart, by file name, for every cost that was measured."""
    scored = [row for row in rows if row.value_mean is not None]
    metrics = {row.metric for row in scored}
    metric = metrics.pop() if len(metrics) == 1 else "mean"
    time = _TRAIN_TIME if any(row.train_time_s for row in scored) else _WALL_TIME
    return {
        f"accuracy_vs_{cost.name}": Chart(
            f"{str(metric).capitalize()} against {cost.title}",
            _scatter(comparison, scored, cost, str(metric)),
        )
        for cost in (_PARAMETERS, _MEMORY, time, _FORGETTING)
        if any(map(cost.is_known, scored))
    }


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other one beats, by cost.

    Args:
        points: (cost, gain). One beats another if it costs no more and is worth no less, and
            differs in one of them.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        last = points[front[-1]] if front else None
        if last is None or points[i][1] > last[1] or points[i] == last:  # the same point twice
            front.append(i)
    return front


def pareto_steps(front: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the line below and right of which everything is beaten by the front."""
    corners = list(front[:1])
    for (_, value), (cost, next_value) in pairwise(front):
        corners += [(cost, value), (cost, next_value)]
    return corners


def _explanation(comparison: Comparison) -> str:
    words = (
        "Line and filled points: the Pareto front, methods that no other one beats in both "
        "directions. Bars: standard deviation over seeds. Dotted: the base as it is."
    )
    is_long = any(len(comparison.names[method]) > MAX_NAME for method in comparison.tuned)
    if is_long or len(comparison.tuned) > _MAX_NAMES:
        words += " Numbers: the place in the ranking above."
    if any(row.forgetting is not None for row in comparison.rows):
        words += " Left of 0 on the axis of forgetting, general text has become likelier."
    return words


def _scatter(comparison: Comparison, rows: Sequence[Summary], cost: Cost, metric: str) -> Figure:
    figure, axes = new_figure()
    unit = unit_of(metric)
    places = {row.method: i for i, row in enumerate(ranked(rows), 1)}
    points = [row for row in rows if cost.is_known(row)]
    front = _draw_points(comparison, axes, points, cost)
    labels = []
    for row in points:
        is_named = row in front or len(points) <= _MAX_NAMES or row.method == comparison.reference
        place = places[row.method]
        name = comparison.chart_name(row.method, place) if is_named else str(place)
        labels.append(Label(name, cost.of(row), *_value(row)))
    low, high = _limits(labels, metric)
    axes.set_ylim(low, high)
    apart = []
    for row in (row for row in rows if not row.num_trainable_params):
        name, (y, _) = comparison.names[row.method], _value(row)
        if low < y < high:
            axes.axhline(y, color=INK, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
            labels.append(Label(name, None, y))
        else:
            words = f"{name} {unit.text(row.value_mean)}{unit.sign}"
            apart.append(words.replace(" ", "\N{NO-BREAK SPACE}"))
    axes.set_ylabel("loss, nats per token" if is_lower_better(metric) else f"{metric}, %")
    _scale_x(axes, cost, [cost.of(row) for row in points])
    axes.set_xlabel(cost.label)
    if apart:
        outside = textwrap.fill("outside the chart: " + ", ".join(apart), 56)
        figure.supxlabel(outside, size=8.5, color=INK)
    steps = pareto_steps([(cost.of(row), _value(row)[0]) for row in front])
    place_labels(axes, labels, INK, steps)
    return figure


def _draw_points(
    comparison: Comparison, axes: Axes, points: Sequence[Summary], cost: Cost
) -> list[Summary]:
    """Draw the methods and their front; return the methods on it, by cost."""
    places = [(cost.of(row), _value(row)[0]) for row in points]
    indices = pareto_front([(cost.of(row), gain(row.metric, _value(row)[0])) for row in points])
    steps = pareto_steps([places[i] for i in indices])
    axes.plot(*zip(*steps, strict=True), color=INK, alpha=0.45, lw=1.2, zorder=1)
    for i, row in enumerate(points):
        color, marker = comparison.styles[row.method]
        inside = color if i in indices else "none"
        looks: dict[str, Any] = {"color": color, "marker": marker, "markerfacecolor": inside}
        looks |= {"markeredgewidth": 1.5, "elinewidth": 1, "ms": 7, "capsize": 3}
        axes.errorbar([places[i][0]], [places[i][1]], _value(row)[1] or None, **looks)
    return [points[i] for i in indices]


def _value(row: Summary) -> tuple[float, float]:
    """Value and deviation in the metric's unit."""
    scale = unit_of(row.metric).scale
    return scale * (row.value_mean or 0.0), scale * (row.value_sd or 0.0)


def _limits(points: Sequence[Label], metric: str) -> tuple[float, float]:
    """Limits that show the differences between methods, but do not blow up less than ten points.

    Of a loss, less than a tenth of it.
    """
    low = min(point.y - point.half_height for point in points)
    high = max(point.y + point.half_height for point in points)
    least = 0.1 * high if is_lower_better(metric) else 10
    margin = max(0.22 * (high - low), (least - (high - low)) / 2)
    if is_lower_better(metric):
        return max(low - margin, 0.0), high + margin
    return max(low - margin, min(low, 0.0) - 1.5), min(high + margin, 101.5)


def _scale_x(axes: Axes, cost: Cost, values: Sequence[float]) -> None:
    """Logarithmic where the largest is more than eight times the smallest; not of what may be 0."""
    if 0 < 8 * min(values) < max(values) and cost is not _FORGETTING:
        axes.set_xscale("log")
        few_decades = max(values) < 300 * min(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(short_number))
    axes.margins(x=0.2)
