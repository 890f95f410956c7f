"""HTML that sections share: escaped text, sortable tables, charts, numbers in words."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from matplotlib.figure import Figure

from lowmem_reft.compare.report.figures import INK

Heading = tuple[str, bool]
"""A column's title, and whether it holds text (which sorts upwards first)."""
MANY_ROWS = 60
"""A table with more rows than these is folded away."""
_DASH = "–"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page."""

    name: str
    """Anchor, and prefix of ids; letters and hyphens."""
    title: str
    body: str
    """Finished HTML."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """Charts in ``body``, to be written as PNG files too, by file name."""


def table(headings: Sequence[Heading], rows: Iterable[Sequence[str]], *, by: int = -1) -> str:
    """A sortable table that scrolls inside its frame.

    Args:
        headings: One per column.
        rows: Finished cells: ``text``, ``number``, ``row_name``.
        by: Column in whose order, the largest first, the rows are.
    """
    order = ' aria-sort="descending"'
    head = "".join(
        f'<th scope="col" class="{"text" if is_text else "number"}"{order if i == by else ""}>'
        f'<button type="button">{_unbroken(title)}</button></th>'
        for i, (title, is_text) in enumerate(headings)
    )
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="scroll" tabindex="0">\n<table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _unbroken(title: str) -> str:
    """A short heading stays on one line with its unit."""
    return escape(title.replace(" ", "\N{NO-BREAK SPACE}") if len(title) <= 12 else title)


def row_name(name: str, rank: int | None = None) -> str:
    """The first cell of a row: a method, its settings small beside it."""
    method, bracket, settings = name.partition("[")
    shown = escape(method)
    if bracket:  # lines break between settings, not within one
        parts = escape(bracket + settings).replace(",", ",</span><span>")
        shown += f'<wbr/><span class="settings"><span>{parts}</span></span>'
    before = f'<span class="rank">{rank}</span>' if rank is not None else ""
    return f'<th scope="row" data-value="{escape(name)}">{before}{shown}</th>'


def text(words: str, css: str = "") -> str:
    """A cell of text."""
    value = escape(words)
    return f'<td class="{f"text {css}".strip()}" data-value="{value}">{value}</td>'


def number(value: float | None, shown: str | None = None, css: str = "") -> str:
    """A cell of a number.

    Args:
        value: What the column is sorted by; None stays last.
        shown: How it is written, as text; a dash where there is none.
        css: Class.
    """
    key = "" if value is None else f"{value:.10g}"
    attributes = f' class="{css}"' if css else ""
    return f'<td data-value="{key}"{attributes}>{escape(shown or _DASH)}</td>'


def scaled(value: float | None, scale: float = 1.0, digits: int = 0) -> str:
    """A cell of a number in the unit and with the digits of its heading."""
    return number(value, None if value is None else f"{value * scale:,.{digits}f}")


def signed(value: float, digits: int = 1) -> str:
    """A difference with its sign; nothing is written as minus nought."""
    rounded = f"{abs(value):.{digits}f}"
    if float(rounded) == 0:
        return rounded
    return f"{'+' if value > 0 else '−'}{rounded}"


def p_value(p: float) -> str:
    """A p-value with the digits that mean something."""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def note(words: str) -> str:
    """A paragraph beside the matter."""
    return f'<p class="muted">{escape(words)}</p>'


def folded(summary: str, body: str, *, is_open: bool = False) -> str:
    """What is opened by a click, and for print."""
    state = ' open="open"' if is_open else ""
    return f"<details{state}>\n<summary>{escape(summary)}</summary>\n{body}\n</details>"


def listed(results: Sequence[dict[str, Any]], name: str) -> str:
    """All values of a field of the results, each once, in words."""
    found = (str(result[name]) for result in results if result.get(name) is not None)
    return ", ".join(dict.fromkeys(found))


def chart(name: str, title: str, figure: Figure) -> str:
    """A chart with its title, as a picture that takes the colours of the page."""
    svg = svg_text(figure)
    # Ids are unique per figure only; two figures in one page must not use each other's clip paths
    # and markers.
    for mark in (' id="', ' xlink:href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{name}-")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    return f"<figure>\n<figcaption>{escape(title)}</figcaption>\n{svg}\n</figure>"


def svg_text(figure: Figure) -> str:
    """The figure as an ``<svg>`` element; its text and axes take the colour of the page."""
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt keeps the ids, and so the file, the same from run to run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowmem-reft"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*</metadata>", "", svg, flags=re.DOTALL)
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def embedded_json(name: str, content: object) -> str:
    """Data for a script of the page; no text in it can end the element or begin another."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    return f'<script type="application/json" id="{name}">{data}</script>'
