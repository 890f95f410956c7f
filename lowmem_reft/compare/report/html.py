"""The report as HTML: sections made of the macros in ``templates/parts.html``, and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from markupsafe import Markup
from matplotlib.figure import Figure

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.figures import svg_text
from lowmem_reft.compare.report.table import Measure
from lowmem_reft.compare.report.verdict import sentences
from lowmem_reft.machine.pages import templates

_MANY_ROWS = 60
_TEMPLATES = templates(Path(__file__).with_name("templates"))


class _Macros(Protocol):
    def __getattr__(self, name: str) -> Callable[..., Markup]: ...


html = cast(_Macros, _TEMPLATES.get_template("parts.html").module)
"""The macros, as functions; they escape what they are given, unless it is ``Markup``."""


class Chart(NamedTuple):
    """A figure of the page."""

    title: str
    figure: Figure


class Column(NamedTuple):
    """A column of a table in the page."""

    title: str
    cell: Callable[[Any], Markup]
    """A macro's cell for an item."""
    kind: str = "number"
    """Or ``text``, which sorts upwards first."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page."""

    name: str
    """Anchor, and prefix of ids; letters and hyphens."""
    title: str
    parts: Sequence[Markup]
    charts: Mapping[str, Chart] = field(default_factory=dict)
    """Those in ``parts``, to be written as PNG files too, by file name."""

    @property
    def body(self) -> Markup:
        """The parts, one below the other."""
        return Markup("\n").join(self.parts)


def render_page(comparison: Comparison, sections: Sequence[Section]) -> str:
    """One self-contained page: opens from a file, fetches nothing, fits a phone."""
    return _TEMPLATES.get_template("report.html").render(
        title=comparison.title,
        summary=comparison.summary,
        verdicts=sentences(comparison.verdicts),
        sections=sections,
    )


def table(
    columns: Sequence[Column],
    items: Iterable[Any],
    *,
    by: int | None = None,
    rising: bool = False,
    many: str = "",
) -> Markup:
    """A sortable table that scrolls inside its frame.

    Args:
        columns: What is shown of each item.
        items: One per row.
        by: Column in whose order, the largest first, the items are.
        rising: The smallest is the first instead.
        many: What the items are called where there are so many that they are folded away.
    """
    rows = [[column.cell(item) for column in columns] for item in items]
    made = html.table(columns, rows, by, rising)
    is_folded = many and len(rows) > _MANY_ROWS
    return folded(f"All {len(rows)} {many}", made) if is_folded else made


def shown(measures: Iterable[Measure]) -> list[Column]:
    """The columns for what is measured of a method or a run."""
    kinds = {"text": "text"}
    return [Column(m.title, partial(_cell, m), kinds.get(m.kind, "number")) for m in measures]


def _cell(measure: Measure, item: Any) -> Markup:
    words = measure.text(item)
    if measure.kind != "text":
        return html.number(measure.number(item), words, "bad" if words == "failed" else "")
    return html.method(words) if measure.field == "method" else html.text(words)


def folded(summary: str, *parts: Markup) -> Markup:
    """What is opened by a click, and for print."""
    return html.folded(summary, Markup("\n").join(parts))


def charts(found: Mapping[str, Chart]) -> Markup:
    """Charts beside each other, as pictures that take the colours of the page."""
    return html.charts([chart(name, *each) for name, each in found.items()])


def chart(name: str, title: str, figure: Figure) -> Markup:
    """One chart with its title."""
    svg = svg_text(figure)
    # Ids are unique per figure only; two figures in one page must not use each other's clip paths
    # and markers.
    for mark in (' id="', ' xlink:href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{name}-")
    label = Markup('<svg role="img" aria-label="{}" ').format(title)
    return html.chart(title, Markup(svg.replace("<svg ", label, 1)))
