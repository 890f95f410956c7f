"""The charts of a page of timelines, drawn by plotly."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.pages import INK, MIDDLE_GREY
from lowmem_reft.memory.timeline import Curve, color_of, phase_color, unit_of, words


def draw_charts(curves: Mapping[str, Curve]) -> Any:
    """Return plotly's figure: one chart under the other, all to the scale of the highest.

    Each has a filled trace per category, and a line of the total that tells the phase too.

    Raises:
        InputError: Plotly is not installed.
    """
    try:
        from plotly import subplots
    except ImportError as error:
        raise InputError(
            "plotly must be installed to write an interactive page, got none; "
            "pip install 'lowmem-reft[report]'"
        ) from error
    highest = max(curve.peak_bytes for curve in curves.values())
    unit, symbol = unit_of(highest)
    figure = subplots.make_subplots(rows=len(curves), vertical_spacing=0.25 / len(curves))
    figure.update_layout(
        hovermode="x unified",
        hoverlabel={"bgcolor": "white", "font": {"color": INK}},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "color": INK},
        legend={"orientation": "h", "traceorder": "normal", "y": -0.2 / len(curves), "x": 0},
        margin={"l": 60, "r": 10, "t": 45, "b": 20},
        shapes=[shape for i, curve in enumerate(curves.values(), 1) for shape in _ribbon(i, curve)],
    )
    figure.update_xaxes(
        showgrid=False,
        tickformat=",d",
        title={"text": "allocations and frees, in order", "standoff": 6},
    )
    figure.update_yaxes(
        range=[0, 1.12 * highest / unit],
        gridcolor="rgba({},{},{},.28)".format(*bytes.fromhex(MIDDLE_GREY[1:])),
        title={"text": f"live memory, {symbol}"},
        fixedrange=True,
        zeroline=False,
    )
    for number, (name, curve) in enumerate(curves.items(), start=1):
        figure.update_xaxes(range=[0, curve.num_changes], row=number)
        _add_traces(figure, number, curve, unit, symbol)
        _add_notes(figure, number, name, curve, unit, symbol)
    return figure


def _add_traces(figure: Any, number: int, curve: Curve, unit: float, symbol: str) -> None:
    common = {"mode": "lines", "x": curve.moments, "row": number, "col": 1}
    level = {"width": 0, "shape": "hv"}
    shown = {trace.legendgroup for trace in figure.data}
    for name, sizes in curve.sizes.items():
        figure.add_scatter(
            **common,
            y=sizes / unit,
            name=escape(words(name)),
            legendgroup=name,
            showlegend=name not in shown,
            stackgroup=str(number),
            line={**level, "color": color_of(name)},
            fillcolor=color_of(name),
            hovertemplate=f"%{{y:,.3f}} {symbol}",
        )
    figure.add_scatter(
        **common,
        y=curve.totals / unit,
        name="total",
        showlegend=False,
        line={**level, "color": MIDDLE_GREY},
        customdata=[escape(phase) for phase in curve.phases],
        hovertemplate=f"%{{y:,.3f}} {symbol}, %{{customdata}}",
    )


def _ribbon(number: int, curve: Curve) -> list[dict[str, Any]]:
    """The phases as a tint of the chart, and as a band above it."""
    # All at once and not by add_shape, which looks at every shape that is there already.
    where = {
        "type": "rect",
        "xref": _axis("x", number),
        "yref": _axis("y", number) + " domain",
        "layer": "below",
    }
    return [
        {
            **where,
            "line": {"width": 0},
            **{"x0": start, "x1": end, "y0": y0, "y1": y1},
            "opacity": opacity,
            "fillcolor": phase_color(phase),
        }
        for start, end, phase in curve.bands
        for y0, y1, opacity in ((0, 1, 0.25), (1, 1.03, 1))
    ]


def _add_notes(figure: Any, number: int, name: str, curve: Curve, unit: float, symbol: str) -> None:
    """The chart's heading, and the peak with its value."""
    x, y = int(curve.moments[curve.peak]), curve.peak_bytes / unit
    on_the_left = x > 0.6 * curve.num_changes
    figure.add_annotation(
        text=f"<b>{escape(name)}</b>",
        **{"xref": "paper", "x": 0, "xanchor": "left"},
        **{"yref": _axis("y", number) + " domain", "y": 1.04, "yanchor": "bottom"},
        showarrow=False,
        font={"size": 15},
    )
    figure.add_annotation(
        text=f"<b>peak {y:,.2f} {symbol}, {escape(curve.phases[curve.peak])}</b>",
        **{"xref": _axis("x", number), "x": x, "ax": -50 if on_the_left else 50},
        **{"yref": _axis("y", number), "y": y, "ay": -14},
        xanchor="right" if on_the_left else "left",
        arrowhead=6,
        arrowsize=0.9,
        arrowwidth=1,
        arrowcolor=MIDDLE_GREY,
    )


def _axis(letter: str, number: int) -> str:
    """Plotly's name of an axis has no number for the first one."""
    return letter if number == 1 else f"{letter}{number}"
