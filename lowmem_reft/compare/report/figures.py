"""What the charts of a comparison share: size, ink, and a colour and marker for each method.

Each method keeps its colour and marker in all charts and is named beside its points, so that no
legend has to be read and no colour has to be told apart. Colours: Okabe and Ito's set, safe for
colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#1f2329"
"""Text and lines; in the page, the colour of the page's own text."""
Style = tuple[str, str]
"""Colour and marker."""
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
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
