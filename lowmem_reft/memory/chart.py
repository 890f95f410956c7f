"""The charts of a page of timelines, as plotly describes them: traces and layout."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lowmem_reft.machine.pages import INK, MIDDLE_GREY
from lowmem_reft.memory.timeline import Curve, color_of, phase_color, unit_of, words


def traces(curves: Mapping[str, Curve]) -> list[dict[str, Any]]:
    """Return plotly's traces: a filled one per category, and the total with its phase."""
    unit, symbol = unit_of(max(curve.peak_bytes for curve in curves.values()))
    made: list[dict[str, Any]] = []
    for number, curve in enumerate(curves.values(), start=1):
        common = {
            "type": "scatter",
            "mode": "lines",
            "x": curve.moments,
            "xaxis": f"x{_suffix(number)}",
            "yaxis": f"y{_suffix(number)}",
        }
        for name, sizes in curve.sizes.items():
            shown_before = any(trace.get("legendgroup") == name for trace in made)
            made.append(
                {
                    **common,
                    "y": sizes / unit,
                    "name": escape(words(name)),
                    "legendgroup": name,
                    "showlegend": not shown_before,
                    "stackgroup": str(number),
                    "line": {"width": 0, "shape": "hv", "color": color_of(name)},
                    "fillcolor": color_of(name),
                    "hovertemplate": f"%{{y:,.3f}} {symbol}",
                }
            )
        made.append(
            {
                **common,
                "y": curve.totals / unit,
                "name": "total",
                "showlegend": False,
                "line": {"width": 0, "shape": "hv", "color": MIDDLE_GREY},
                "customdata": [escape(phase) for phase in curve.phases],
                "hovertemplate": f"%{{y:,.3f}} {symbol}, %{{customdata}}",
            }
        )
    return made


def layout(curves: Mapping[str, Curve]) -> dict[str, Any]:
    """Return plotly's layout: one chart under the other, all to the scale of the highest."""
    highest = max(curve.peak_bytes for curve in curves.values())
    unit, symbol = unit_of(highest)
    made: dict[str, Any] = {
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "white", "font": {"color": INK}},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "color": INK},
        "legend": {"orientation": "h", "traceorder": "normal", "y": -0.2 / len(curves), "x": 0},
        "margin": {"l": 60, "r": 10, "t": 45, "b": 20},
        "shapes": [],
        "annotations": [],
    }
    gap = 0.25 / len(curves)
    height = (1 - gap * (len(curves) - 1)) / len(curves)
    for number, (name, curve) in enumerate(curves.items(), start=1):
        top = 1 - (number - 1) * (height + gap)
        made[f"xaxis{number}"] = {
            "anchor": f"y{_suffix(number)}",
            "range": [0, curve.num_changes],
            "showgrid": False,
            "tickformat": ",d",
            "title": {"text": "allocations and frees, in order", "standoff": 6},
        }
        made[f"yaxis{number}"] = {
            "anchor": f"x{_suffix(number)}",
            "domain": [max(0, top - height), top],
            "range": [0, 1.12 * highest / unit],
            "gridcolor": "rgba({},{},{},.28)".format(*bytes.fromhex(MIDDLE_GREY[1:])),
            "title": {"text": f"live memory, {symbol}"},
            "fixedrange": True,
            "zeroline": False,
        }
        made["shapes"] += _ribbon(number, curve)
        made["annotations"] += _notes(number, name, curve, unit, symbol)
    return made


def _ribbon(number: int, curve: Curve) -> list[dict[str, Any]]:
    where = {"type": "rect", "xref": f"x{_suffix(number)}", "yref": f"y{_suffix(number)} domain"}
    return [
        {
            **where,
            "line": {"width": 0},
            "x0": start,
            "x1": end,
            "y0": y0,
            "y1": y1,
            "opacity": opacity,
            "layer": "below",
            "fillcolor": phase_color(phase),
        }
        for start, end, phase in curve.bands
        for y0, y1, opacity in ((0, 1, 0.25), (1, 1.03, 1))
    ]


def _notes(number: int, name: str, curve: Curve, unit: float, symbol: str) -> list[dict[str, Any]]:
    """Return the chart's heading, and the peak with its value."""
    x, y = int(curve.moments[curve.peak]), curve.peak_bytes / unit
    on_the_left = x > 0.6 * curve.num_changes
    return [
        {
            "text": f"<b>{escape(name)}</b>",
            "xref": "paper",
            "yref": f"y{_suffix(number)} domain",
            "x": 0,
            "y": 1.04,
            "xanchor": "left",
            "yanchor": "bottom",
            "showarrow": False,
            "font": {"size": 15},
        },
        {
            "text": f"<b>peak {y:,.2f} {symbol}, {escape(curve.phases[curve.peak])}</b>",
            "xref": f"x{_suffix(number)}",
            "yref": f"y{_suffix(number)}",
            "x": x,
            "y": y,
            "ax": -50 if on_the_left else 50,
            "ay": -14,
            "xanchor": "right" if on_the_left else "left",
            "arrowhead": 6,
            "arrowsize": 0.9,
            "arrowwidth": 1,
            "arrowcolor": MIDDLE_GREY,
        },
    ]


def _suffix(number: int) -> str:
    """Plotly's name of an axis has no number for the first one."""
    return "" if number == 1 else str(number)
