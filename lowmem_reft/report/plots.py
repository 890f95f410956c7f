"""The charts of a comparison: accuracy against memory, accuracy against parameters, loss curves.

Each method keeps its colour and marker in all charts and is named beside its points, so that no
legend has to be read and no colour has to be told apart. Colours: Okabe and Ito's set, safe for
colour-blind readers.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lowmem_reft.report.labels import Label, label_ends, place_labels
from lowmem_reft.report.table import Row

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vP"
_INK = "#1f2329"
_SIZE_INCHES = (4.6, 3.6)
Style = tuple[str, str]
"""Colour and marker."""


def draw_plots(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Figure]:
    """The charts for which there are measurements, by file name.

    Args:
        rows: ``aggregate(results)``.
        results: The cells, for their loss histories.

    Returns:
        Figures named ``accuracy_vs_memory``, ``accuracy_vs_parameters`` and ``loss_curves``.
    """
    tuned = list(dict.fromkeys(row.method for row in rows if row.num_trainable_params))
    styles = {
        method: (_COLORS[i % len(_COLORS)], _MARKERS[(i // len(_COLORS) + i) % len(_MARKERS)])
        for i, method in enumerate(tuned)
    }
    figures = {}
    if any(row.peak_bytes and row.value_mean is not None for row in rows):
        figures["accuracy_vs_memory"] = _scatter(
            rows, styles, lambda row: (row.peak_bytes or 0) / 2**20, "peak memory in training, MiB"
        )
    if any(row.num_trainable_params and row.value_mean is not None for row in rows):
        figures["accuracy_vs_parameters"] = _scatter(
            rows,
            styles,
            lambda row: row.num_trainable_params or 0,
            "trainable parameters",
            log=True,
        )
    curves = _mean_curves(results)
    if curves:
        figures["loss_curves"] = _loss_curves(curves, styles)
    return figures


def svg_text(figure: Figure) -> str:
    """The figure as an ``<svg>`` element; its text and axes take the colour of the page."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt keeps the ids, and so the file, the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowmem-reft"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :].replace(_INK, "currentColor")


def _scatter(
    rows: Sequence[Row],
    styles: dict[str, Style],
    x_of: Callable[[Row], float],
    x_label: str,
    *,
    log: bool = False,
) -> Figure:
    figure, axes = _new_figure()
    scored = [row for row in rows if row.value_mean is not None]
    points = [
        Label(row.method, x_of(row), 100 * (row.value_mean or 0), 100 * (row.value_sd or 0))
        for row in scored
        if x_of(row)
    ]
    for point in points:
        color, marker = styles[point.name]
        bars = point.half_height or None
        axes.errorbar(
            [point.x or 0.0], [point.y], bars, color=color, marker=marker, ms=7, capsize=3
        )
    low, high = _limits(points)
    axes.set_ylim(low, high)
    apart = []
    for row in (row for row in scored if not x_of(row)):
        y = 100 * (row.value_mean or 0)
        if low < y < high:
            axes.axhline(y, color=_INK, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
            points.append(Label(row.method, None, y))
        else:
            apart.append(f"{row.method}\N{NO-BREAK SPACE}{y:.1f}\N{NO-BREAK SPACE}%")
    metrics = {row.metric for row in scored}
    axes.set_ylabel(f"{metrics.pop() if len(metrics) == 1 else 'value'}, %")
    _scale_x(axes, [point.x for point in points if point.x], log=log)
    axes.set_xlabel(x_label)
    if apart:
        note = textwrap.fill("outside the chart: " + ", ".join(apart), 56)
        figure.supxlabel(note, size=8.5, color=_INK)
    place_labels(axes, points, _INK)
    return figure


def _limits(points: Sequence[Label]) -> tuple[float, float]:
    """Limits that show the differences between methods, but do not blow up less than ten points."""
    low = min(point.y - point.half_height for point in points)
    high = max(point.y + point.half_height for point in points)
    margin = max(0.22 * (high - low), (10 - (high - low)) / 2)
    return max(low - margin, -1.5), min(high + margin, 101.5)


def _scale_x(axes: Axes, values: Sequence[float], *, log: bool) -> None:
    if log:
        axes.set_xscale("log")
        few_decades = max(values) < 300 * min(values)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(_short_number))
    axes.margins(x=0.2)


def _loss_curves(curves: dict[str, list[tuple[float, float]]], styles: dict[str, Style]) -> Figure:
    figure, axes = _new_figure()
    ends = []
    for method, points in curves.items():
        steps, losses = zip(*points, strict=True)
        color, marker = styles.get(method, (_INK, "o"))
        every = max(1, len(points) // 6)
        axes.plot(steps, losses, color=color, marker=marker, markersize=4, markevery=every, lw=1.5)
        ends.append(Label(method, steps[-1], losses[-1]))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, mean over seeds")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0) if low < 0.25 * high else low, high)
    label_ends(axes, ends, _INK)
    return figure


def _new_figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(which="both", colors=_INK, labelsize=9.5)
    axes.xaxis.label.set(color=_INK, size=10.5)
    axes.yaxis.label.set(color=_INK, size=10.5)
    axes.grid(alpha=0.18, color=_INK, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _mean_curves(results: Sequence[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
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


def _short_number(number: float, _position: int) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"
