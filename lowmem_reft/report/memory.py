"""Pictures of one training step's memory: a PNG, and a page to explore."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft.errors import InputError
from lowmem_reft.memory.live import CATEGORIES

if TYPE_CHECKING:
    import numpy as np

    from lowmem_reft.memory.live import Block

Timeline = Sequence[tuple[str, Mapping[str, int]]]
"""(phase, bytes by category) after every change."""

# Okabe and Ito's colours, which colour-blind people can tell apart, and two greys.
COLORS = {
    "weights": "#999999",
    "quantization_constants": "#cccccc",
    "adapter": "#0072B2",
    "gradients": "#D55E00",
    "optimizer": "#CC79A7",
    "inputs": "#000000",
    "activations": "#56B4E9",
    "loss": "#F0E442",
    "workspace": "#E69F00",
    "store": "#009E73",
}
MAX_POINTS = 2000


def thinned(timeline: Timeline, max_points: int = MAX_POINTS) -> Timeline:
    """Return at most about ``max_points`` entries, the largest of every stretch among them."""
    if len(timeline) <= max_points:
        return timeline
    stride = -(-2 * len(timeline) // max_points)
    kept: list[tuple[str, Mapping[str, int]]] = []
    for start in range(0, len(timeline), stride):
        part = range(start, min(start + stride, len(timeline)))
        totals = [sum(timeline[index][1].values()) for index in part]
        highest = part[totals.index(max(totals))]
        kept += [timeline[index] for index in sorted({start, highest})]
    return kept


def _arrays(timeline: Timeline) -> tuple[list[str], np.ndarray]:
    """Return the categories that occur and their bytes, (category, time)."""
    import numpy as np

    names = [name for name in CATEGORIES if any(sizes.get(name) for _, sizes in timeline)]
    rows = [[sizes.get(name, 0) for _, sizes in timeline] for name in names]
    return names, np.asarray(rows, dtype=float).reshape(len(names), len(timeline))


def _phases(timeline: Timeline) -> list[tuple[int, int, str]]:
    """Return (start, end, name) of the stretches; recomputation belongs to the backward pass."""
    stretches: list[tuple[int, int, str]] = []
    for index, (phase, _) in enumerate(timeline):
        name = "backward" if phase == "recompute" else phase
        if stretches and stretches[-1][2] == name:
            stretches[-1] = (stretches[-1][0], index, name)
        else:
            stretches.append((index, index, name))
    return stretches


def _unit(num_bytes: float) -> tuple[float, str]:
    return (2.0**30, "GiB") if num_bytes >= 2**30 else (2.0**20, "MiB")


def draw_timeline(
    path: Path, timeline: Timeline, *, title: str, budget_bytes: int | None = None
) -> Path:
    """Draw live bytes by category over one step.

    Args:
        path: PNG to write.
        timeline: ``LiveMemory.timeline``.
        title: Heading.
        budget_bytes: Draw a line here.

    Returns:
        ``path``.
    """
    from matplotlib.figure import Figure

    points = thinned(timeline)
    names, sizes = _arrays(points)
    totals = sizes.sum(0)
    unit, label = _unit(totals.max())
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.stackplot(
        range(len(points)),
        sizes / unit,
        labels=[name.replace("_", " ") for name in names],
        colors=[COLORS[name] for name in names],
        step="post",
        linewidth=0,
    )
    top = int(totals.argmax())
    axes.plot([top], [totals[top] / unit], "kv", markersize=6)
    right = top < len(points) * 0.7
    axes.annotate(
        f"peak {totals[top] / unit:,.2f} {label}",
        (top, totals[top] / unit),
        xytext=(8 if right else -8, 4),
        textcoords="offset points",
        ha="left" if right else "right",
    )
    highest = totals.max() / unit * 1.12
    for start, end, name in _phases(points):
        if end - start > len(points) / 40:
            axes.axvline(start, color="black", linewidth=0.5, alpha=0.4)
            axes.text((start + end) / 2, highest, name, ha="center", va="top", fontsize=9)
    if budget_bytes is not None:
        axes.axhline(budget_bytes / unit, color="red", linestyle="--", linewidth=1)
    axes.set_xlim(0, len(points) - 1)
    axes.set_ylim(0, highest)
    axes.set_xticks([])
    axes.set_xlabel("allocations and releases, in order")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False)
    figure.savefig(path, dpi=130)
    return path


def write_timeline_html(
    path: Path,
    timelines: Mapping[str, Timeline],
    *,
    title: str,
    facts: Sequence[tuple[str, str]],
    largest: Sequence[Block],
) -> Path:
    """Write one self-contained page with the timelines, facts and the largest allocations.

    Args:
        path: HTML to write.
        timelines: By name, drawn one below the other.
        title: Heading.
        facts: Name and value, in a table.
        largest: ``Peak.largest``.

    Returns:
        ``path``.

    Raises:
        InputError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as plotly
    except ImportError as error:
        raise InputError(
            "the interactive timeline must have plotly, got none; pip install 'lowmem-reft[report]'"
        ) from error
    charts = []
    for number, (name, timeline) in enumerate(timelines.items()):
        chart = _chart(plotly, timeline, f"{name}: live bytes by category")
        charts.append(
            chart.to_html(full_html=False, include_plotlyjs=number == 0, default_height="420px")
        )
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(block)) + "</tr>"
        for block in largest
    )
    known = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("MiB", "category", "operator", "pass", "module", "line")
    )
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #222; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #ddd; }}
td:first-child {{ font-variant-numeric: tabular-nums; }}
</style></head><body>
<h1>{html.escape(title)}</h1>
<table>{known}</table>
{"".join(charts)}
<h2>Largest storages that the step itself had made at its peak</h2>
<table><tr>{head}</tr>{rows}</table>
</body></html>
"""
    path.write_text(page, encoding="utf-8")
    return path


def _chart(plotly: Any, timeline: Timeline, title: str) -> Any:
    points = thinned(timeline)
    names, sizes = _arrays(points)
    unit, label = _unit(sizes.sum(0).max())
    phases = [phase for phase, _ in points]
    chart = plotly.Figure()
    for name, row in zip(names, sizes / unit, strict=True):
        chart.add_trace(
            plotly.Scatter(
                y=row.round(4).tolist(),
                name=name.replace("_", " "),
                stackgroup="one",
                mode="lines",
                line={"width": 0, "shape": "hv", "color": COLORS[name]},
                fillcolor=COLORS[name],
                text=phases,
                hovertemplate=f"%{{y:,.3f}} {label} (%{{text}})",
            )
        )
    chart.update_layout(
        title=title,
        yaxis_title=label,
        xaxis_title="allocations and releases, in order",
        hovermode="x unified",
        template="simple_white",
        margin={"t": 50, "b": 40},
    )
    return chart


def _cells(block: Block) -> tuple[str, ...]:
    place = block.place
    assert place is not None
    size = f"{block.num_bytes / 2**20:,.2f}"
    return size, block.category, place.operator, place.phase, place.module, place.line
