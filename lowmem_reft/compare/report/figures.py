"""What the charts of a comparison share: size, ink, and a colour and marker for each method.

Each method keeps its colour and marker in all charts and is named beside its points, so that no
legend has to be read and no colour has to be told apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lowmem_reft.machine.pages import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILION

Style = tuple[str, str]
"""Colour and marker."""
_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_MARKERS = "osD^vP"


def method_styles(methods: Iterable[str]) -> dict[str, Style]:
    """A colour and marker for each method; 36 methods differ."""
    return {
        method: (_COLORS[i % len(_COLORS)], _MARKERS[(i // len(_COLORS) + i) % len(_MARKERS)])
        for i, method in enumerate(dict.fromkeys(methods))
    }


def new_figure(width_inches: float = 4.6, height_inches: float = 3.6) -> tuple[Figure, Axes]:
    """An empty chart with quiet axes."""
    figure = Figure(figsize=(width_inches, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(which="both", colors=INK, labelsize=9.5)
    axes.xaxis.label.set(color=INK, size=10.5)
    axes.yaxis.label.set(color=INK, size=10.5)
    axes.grid(alpha=0.18, color=INK, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def short_number(number: float, _position: int | None = None) -> str:
    """``1.5 M`` for 1,500,000, for axes."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:g}{unit}"
    return f"{number:g}"


def svg_text(figure: Figure) -> str:
    """The figure as an ``<svg>`` element; its text and axes take the colour of the page."""
    buffer = io.StringIO()
    # A fixed salt keeps the ids, and so the file, the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowmem-reft"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"<metadata>.*</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
