"""What the memory at the peak consists of, method by method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.figures import new_figure
from lowmem_reft.compare.report.html import Chart, Section, chart, folded, html, shown, table
from lowmem_reft.compare.report.table import METHOD, Measure
from lowmem_reft.machine.pages import INK
from lowmem_reft.memory.timeline import COLORS, color_of, size_text, unit_of, words

Breakdown = Mapping[str, int]
"""Bytes by category."""


def render(comparison: Comparison) -> Section | None:
    """Stacked bars, and the same numbers as a table."""
    breakdowns = largest_breakdowns(comparison)
    if not breakdowns:
        return None
    names = categories(breakdowns)
    figure = draw({comparison.chart_names[m]: sizes for m, sizes in breakdowns.items()}, names)
    made = Chart("Bytes alive at the peak, by what they are for", figure)
    measures = [METHOD, *(Measure(words(each), each, 2**-20, 2) for each in names)]
    rows = [{"method": m, **s, "sum": sum(s.values())} for m, s in breakdowns.items()]
    numbers = table(shown([*measures, Measure("sum", "sum", 2**-20, 2)]), rows)
    parts = [
        chart("memory_breakdown", *made),
        html.note(_note(comparison)),
        folded("The numbers, in MiB", numbers),
    ]
    found = {"memory_breakdown": made}
    return Section(name="memory", title="What the memory is for", parts=parts, charts=found)


def _note(comparison: Comparison) -> str:
    words = "Of the run with the highest peak of each method."
    if comparison.chart_names != comparison.names:
        words += " Numbers: the place in the ranking above."
    return words


def largest_breakdowns(comparison: Comparison) -> dict[str, Breakdown]:
    """Each method's breakdown of the run in which it is largest, the smallest method first."""
    found: dict[str, Breakdown] = {}
    for result in comparison.results:
        sizes = {k: v for k, v in (result.get("breakdown_bytes") or {}).items() if v}
        if sum(sizes.values()) > sum(found.get(result["method"], {}).values()):
            found[result["method"]] = sizes
    return dict(sorted(found.items(), key=lambda item: sum(item[1].values())))


def categories(breakdowns: Mapping[str, Breakdown]) -> list[str]:
    """The categories that occur, what never changes first, in the order of a step's timeline."""
    found = {name for sizes in breakdowns.values() for name in sizes}
    return [name for name in COLORS if name in found] + sorted(found - set(COLORS))


def draw(breakdowns: Mapping[str, Breakdown], names: list[str]) -> Figure:
    """One bar per method, the smallest on top."""
    methods = list(breakdowns)
    figure, axes = new_figure(5.4, 1.5 + 0.32 * len(methods))
    totals = [sum(sizes.values()) for sizes in breakdowns.values()]
    unit, symbol = unit_of(max(totals))
    starts = [0.0] * len(methods)
    bar: dict[str, Any] = {"edgecolor": "white", "linewidth": 0.5, "height": 0.66}
    for name in names:
        widths = [breakdowns[method].get(name, 0) / unit for method in methods]
        axes.barh(methods, widths, left=starts, color=color_of(name), label=words(name), **bar)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 9}
    beside["color"] = INK
    for place, total in enumerate(totals):
        axes.annotate(size_text(total), (total / unit, place), (4, 0), **beside)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.15 * max(totals) / unit)
    axes.set_xlabel(symbol)
    legend = figure.legend(
        loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK
    )
    legend.set_in_layout(True)
    return figure
