"""Pictures of one training step's memory: a PNG, and one self-contained page to explore."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from lowmem_reft.machine.files import write_text_whole, write_whole
from lowmem_reft.machine.pages import INK, templates
from lowmem_reft.memory.chart import draw_charts
from lowmem_reft.memory.timeline import (
    COLORS,
    Curve,
    Timeline,
    color_of,
    curve_of,
    phase_color,
    size_text,
    unit_of,
    words,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lowmem_reft.memory.live import LiveStorage


def draw_timeline(
    path: Path, timeline: Timeline, *, title: str, budget_bytes: int | None = None
) -> Path:
    """Draw live bytes by category over one step, and the phases it runs through.

    Args:
        path: PNG to write.
        timeline: ``LiveMemory.timeline``.
        title: Heading.
        budget_bytes: Memory to stay within, drawn as a line.

    Returns:
        ``path``.

    Raises:
        InputError: The timeline is empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curve = curve_of(timeline)
    unit, symbol = unit_of(curve.peak_bytes)
    figure = Figure(figsize=(9.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.stackplot(
        curve.moments,
        [sizes / unit for sizes in curve.sizes.values()],
        colors=[color_of(name) for name in curve.sizes],
        step="post",
        linewidth=0,
    )
    highest = max(curve.peak_bytes, budget_bytes or 0) / unit
    axes.set_xlim(0, max(1, curve.num_changes - 1))
    axes.set_ylim(0, 1.14 * highest)
    _mark_peak(axes, curve, budget_bytes, unit, symbol)
    _draw_bands(axes, curve)
    _dress(axes, title, symbol)
    _add_legends(axes, curve)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(
        path, lambda part: figure.savefig(part, format="png", dpi=180, facecolor="white")
    )


def write_timeline_html(
    path: Path,
    timelines: Mapping[str, Timeline],
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    largest: Sequence[LiveStorage],
) -> Path:
    """Write one page with charts to explore, the bytes at the peaks and the largest allocations.

    Args:
        path: HTML to write; it holds all it needs (about 5 MB) and fetches nothing.
        timelines: By name, for example measured and predicted; drawn to the same scale.
        title: Heading.
        facts: Names and values, for example the peaks.
        largest: ``Peak.largest``.

    Returns:
        ``path``.

    Raises:
        InputError: Plotly is not installed, or a timeline is empty.
    """
    curves = {name: curve_of(timeline) for name, timeline in timelines.items()}
    chart = draw_charts(curves)
    names = dict.fromkeys(name for curve in curves.values() for name in sorted(curve.at_peak))
    peaks = {name: curve.at_peak for name, curve in curves.items()}
    categories = [
        each
        for each in dict.fromkeys([*COLORS, *names])
        if any(p.get(each) for p in peaks.values())
    ]
    page = (
        templates(Path(__file__).parent)
        .get_template("timeline.html")
        .render(
            title=title,
            facts=facts,
            phases={
                name: phase_color(name) for curve in curves.values() for name in curve.all_phases
            },
            chart=Markup(
                chart.to_html(
                    full_html=False,
                    include_plotlyjs=True,
                    div_id="chart",
                    default_height=f"{90 + 340 * len(curves)}px",
                    config={"responsive": True, "displayModeBar": False},
                )
            ),
            categories=categories[::-1],
            peaks=peaks,
            largest=largest,
            color_of=color_of,
            words_of=words,
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text_whole(path, page)


def _mark_peak(
    axes: Axes, curve: Curve, budget_bytes: int | None, unit: float, symbol: str
) -> None:
    from matplotlib.patheffects import withStroke

    x, y = curve.moments[curve.peak], curve.peak_bytes / unit
    side = -1 if x > 0.6 * curve.num_changes else 1
    looks: dict[str, Any] = {"textcoords": "offset points", "color": INK}
    looks["path_effects"] = [withStroke(linewidth=3, foreground="#ffffffc0")]
    axes.plot([x], [y], marker="o", ms=5, mfc="white", mec=INK, mew=1.3, zorder=5, clip_on=False)
    text = f"peak {y:,.2f} {symbol}, {curve.phases[curve.peak]}"
    ha = {1: "left", -1: "right"}
    axes.annotate(text, (x, y), (8 * side, 5), ha=ha[side], size=10, fontweight="bold", **looks)
    if budget_bytes is not None:
        budget = budget_bytes / unit
        axes.axhline(budget, color=INK, linewidth=1.2, linestyle=(0, (5, 3)))
        # On the other side than the peak's own text, which may be at the same height.
        spot, where = (0 if side < 0 else 1, budget), ("axes fraction", "data")
        text = f"budget {budget:,.2f} {symbol}"
        axes.annotate(text, spot, (-6 * side, 4), xycoords=where, ha=ha[-side], size=9, **looks)


def _draw_bands(axes: Axes, curve: Curve) -> None:
    """Tint the background by phase, and name the phases in a ribbon above it."""
    across = axes.get_xaxis_transform()
    for phase in curve.all_phases:
        spans = [(start, end - start) for start, end, name in curve.bands if name == phase]
        looks: dict[str, Any] = {"color": phase_color(phase), "lw": 0, "transform": across}
        axes.broken_barh(spans, (0, 1), alpha=0.3, zorder=0, **looks)
        axes.broken_barh(spans, (1, 0.055), clip_on=False, **looks)
    middle: dict[str, Any] = {"transform": across, "ha": "center", "va": "center", "size": 8.5}
    for start, end, phase in curve.bands:
        if end - start > 0.085 * curve.num_changes:
            color = "white" if phase == "optimizer" else INK
            axes.text((start + end) / 2, 1.0275, phase, color=color, **middle)


def _dress(axes: Axes, title: str, symbol: str) -> None:
    from matplotlib.ticker import StrMethodFormatter

    heading = textwrap.fill(title, 84)
    axes.set_title(heading, loc="left", color=INK, size=11.5, pad=20, parse_math=False)
    axes.set_ylabel(f"live memory, {symbol}", color=INK, size=10)
    axes.set_xlabel("allocations and frees, in order", color=INK, size=10)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.tick_params(colors=INK, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def _add_legends(axes: Axes, curve: Curve) -> None:
    """Say what the colours are: categories with their size at the peak, and phases."""
    from matplotlib.legend import Legend
    from matplotlib.patches import Patch

    categories = [
        Patch(color=color_of(name), label=f"{words(name)}  {size_text(num_bytes)}")
        for name, num_bytes in reversed(curve.at_peak.items())
    ]
    phases = [Patch(color=phase_color(phase), label=phase) for phase in curve.all_phases]
    looks: dict[str, Any] = {"frameon": False, "fontsize": 9, "labelcolor": INK}
    looks |= {"alignment": "left", "borderaxespad": 0, "handlelength": 1.1, "handleheight": 1.1}
    upper: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.06)}
    lower: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (1.02, 0.0)}
    for handles, title, where in ((categories, "at the peak", upper), (phases, "phase", lower)):
        labels = [str(handle.get_label()) for handle in handles]
        legend = Legend(axes, handles, labels, title=title, **where, **looks)
        axes.add_artist(legend)
        legend.set_clip_on(False)
