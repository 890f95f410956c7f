"""Where to intervene: the value by layers and positions, if a method was run on a grid of them.

The ablation that PEFT's users asked for (huggingface/peft#1654, #1657): which layers, and which
tokens of the prompt.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.figures import new_figure
from lowmem_reft.compare.report.html import Chart, Section, charts, html
from lowmem_reft.compare.report.names import head
from lowmem_reft.compare.report.table import Summary
from lowmem_reft.data.tasks.metrics import gain, is_lower_better, unit_of
from lowmem_reft.machine.pages import INK, VERMILION

_AXES = ("layers", "positions")
_UNSET = "default"


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Runs that differ in layers and positions only."""

    title: str
    layers: list[str]
    positions: list[str]
    rows: dict[tuple[str, str], Summary]
    """By layers and positions; some may be missing."""


def render(comparison: Comparison) -> Section | None:
    """One map per method, task and remaining setting."""
    found = {
        f"layers_x_positions-{i}" if i else "layers_x_positions": Chart(grid.title, draw(grid))
        for i, grid in enumerate(find_grids(comparison))
    }
    if not found:
        return None
    note = html.note("Mean over seeds. Framed: the best value. Hatched: not run, or failed.")
    parts = [charts(found), note]
    return Section(name="layers-positions", title="Layers and positions", parts=parts, charts=found)


def find_grids(comparison: Comparison) -> list[Grid]:
    """Every group of methods, equal in all else, with two layers at the same two positions."""
    groups: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for result in comparison.results:
        config = result.get("config") or {}
        method = config.get("method") or {}
        if any(method.get(axis) is not None for axis in _AXES):
            key = result["task"], _rest_of(config)
            groups.setdefault(key, {})[result["method"]] = (
                _words(method.get("layers")),
                _words(method.get("positions")),
            )
    grids = []
    for (task, _), places in groups.items():
        rows = [row for row in comparison.rows_of(task) if row.method in places]
        scored = {places[row.method]: row for row in rows if row.value_mean is not None}
        if _has_square(set(scored)):
            layers, positions = (_in_order(words) for words in zip(*places.values(), strict=True))
            metric = next(iter(scored.values())).metric or "value"
            name = head(next(iter(places))) + (f", {task}" if len(comparison.tasks) > 1 else "")
            title = f"{name}: {metric}" + ("" if is_lower_better(metric) else ", %")
            grids.append(Grid(title=title, layers=layers, positions=positions, rows=scored))
    return grids


def draw(grid: Grid) -> Figure:
    """The map: layers downwards, positions to the right, every value written in its cell.

    The better, the darker.
    """
    metric = next(iter(grid.rows.values())).metric
    unit = unit_of(metric)
    cells = [[grid.rows.get((layer, each)) for each in grid.positions] for layer in grid.layers]
    values = np.array([[unit.scale * _mean(cell) for cell in row] for row in cells])
    shape = values.shape
    figure, axes = new_figure(max(4.6, 1.6 + 0.75 * shape[1]), 1.2 + 0.42 * shape[0])
    axes.grid(visible=False)
    # One hue from light to dark reads the same for all eyes and in print; the ends stay apart
    # from white and black text.
    colors = matplotlib.colormaps["Blues"]
    gains = gain(metric, 1.0) * values
    low, high = float(np.nanmin(gains)), float(np.nanmax(gains))
    for (i, j), value in np.ndenumerate(values):
        share = 0.1 + 0.75 * (gains[i, j] - low) / ((high - low) or 1.0)
        looks: dict[str, Any] = {"facecolor": colors(share), "edgecolor": "white", "linewidth": 1}
        if np.isnan(value):
            looks = {"facecolor": "none", "edgecolor": INK, "linewidth": 0}
            looks |= {"hatch": "////", "alpha": 0.35}
        axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, **looks))
        if not np.isnan(value):
            ink = "#ffffff" if share > 0.55 else "#000000"
            axes.text(
                j, i, f"{value:.{unit.digits}f}", ha="center", va="center", color=ink, fontsize=9.5
            )
    for i, j in np.argwhere(gains == high):
        axes.add_patch(
            Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, edgecolor=VERMILION, lw=2)
        )
    axes.set_xticks(range(shape[1]), grid.positions)
    axes.set_yticks(range(shape[0]), grid.layers)
    axes.set_xlim(-0.5, shape[1] - 0.5)
    axes.set_ylim(shape[0] - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("positions")
    axes.set_ylabel("layers")
    return figure


def _has_square(places: set[tuple[str, str]]) -> bool:
    """Whether some two layers were run with the same two positions."""
    positions = [{p for layers, p in places if layers == each} for each in dict(places)]
    return any(len(one & other) >= 2 for one, other in itertools.combinations(positions, 2))


def _mean(row: Summary | None) -> float:
    return float("nan") if row is None or row.value_mean is None else row.value_mean


def _rest_of(config: dict[str, Any]) -> str:
    """All settings but layers, positions and seed, as a key."""
    method = {k: v for k, v in config["method"].items() if k not in _AXES}
    return json.dumps({**config, "method": method, "seed": None}, sort_keys=True)


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ";".join(map(str, value))
    return _UNSET if value is None else str(value)


def _in_order(words: Iterable[str]) -> list[str]:
    """Each once: numbers by size, anything else as it came."""
    found = list(dict.fromkeys(words))
    return sorted(found, key=int) if all(word.isdecimal() for word in found) else found
