"""One self-contained ``report.html``: opens from a file, fetches nothing, fits a phone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path, PurePath
from string import Template
from typing import Any

from lowmem_reft.report.table import Column, Row, aggregate, columns

_TITLES = {
    "accuracy_vs_memory": "Accuracy against peak memory",
    "accuracy_vs_parameters": "Accuracy against trainable parameters",
    "loss_curves": "Training loss",
}
_NOTES = (
    "Means over the seeds that finished, ± sample standard deviation; memory is their largest. "
    "Peak: tensors alive at once in training, weights included (on CUDA: allocated; reserved is "
    "what the card must hold). RSS: the whole process. Adapter: the weight file on disk. "
    "Click a heading to sort."
)


def render_html(results: Sequence[dict[str, Any]], charts: Mapping[str, str]) -> str:
    """The page.

    Args:
        results: The cells, as in ``results.json``.
        charts: ``<svg>`` elements by the names of ``draw_plots``.
    """
    rows = aggregate(results)
    template = Template(Path(__file__).with_name("template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{_listed(results, 'task')} on {PurePath(_listed(results, 'model')).name}"),
        summary=escape(_summary(rows, results)),
        table=_method_table(rows),
        notes=escape(_NOTES),
        charts="\n".join(_figure(name, svg) for name, svg in charts.items()),
        failures=_failures(rows),
        cells=_cell_table(results),
        facts=_facts(results),
    )


def _summary(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> str:
    num_failed = sum(result["error"] is not None for result in results)
    seeds = {result["seed"] for result in results}
    words = [
        f"{sum(row.num_trainable_params != 0 for row in rows)} methods",
        f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}",
        f"{len(results)} runs",
        f"{num_failed} failed" if num_failed else "",
        _listed(results, "device"),
    ]
    return " · ".join(word for word in words if word)


def _method_table(rows: Sequence[Row]) -> str:
    shown = columns(rows)
    return _table(
        [(column.title, column.kind == "text") for column in shown],
        ([_cell(column, row) for column in shown] for row in rows),
    )


def _cell(column: Column, row: Row) -> str:
    text, number = column.text(row), column.number(row)
    if column.kind == "text":
        return _text(text, header=column.field == "method")
    bad = ' class="bad"' if text == "failed" else ""
    return f'<td data-value="{_plain(number)}"{bad}>{escape(text)}</td>'


def _cell_table(results: Sequence[dict[str, Any]]) -> str:
    headings = [
        ("method", True),
        ("seed", False),
        ("value %", False),
        ("eval loss", False),
        ("peak MiB", False),
        ("wall s", False),
        ("how to repeat it", True),
    ]

    def number(value: float | None, scale: float, digits: int) -> str:
        if value is None:
            return '<td data-value="">–</td>'
        return f'<td data-value="{_plain(value)}">{value * scale:,.{digits}f}</td>'

    def cells(result: dict[str, Any]) -> list[str]:
        command = f"<code>{escape(str(result['command']))}</code>"
        failed = result["error"] is not None
        return [
            _text(result["method"], header=True),
            number(result["seed"], 1, 0),
            '<td data-value="" class="bad">failed</td>'
            if failed
            else number(result["value"], 100, 1),
            number(result["loss"], 1, 3),
            number(result["peak_bytes"], 2**-20, 1),
            number(result["wall_time_s"], 1, 0),
            f'<td class="text"><details><summary>command</summary>{command}</details></td>',
        ]

    return _table(headings, map(cells, results))


def _failures(rows: Sequence[Row]) -> str:
    failed = [
        [
            _text(row.method, header=True),
            f'<td class="text bad" data-value="{escape(error)}">{escape(error)}</td>',
        ]
        for row in rows
        for error in row.errors
    ]
    if not failed:
        return ""
    table = _table([("method", True), ("error", True)], failed)
    note = "The full output of a run is in its directory, in log.txt."
    return f'<section>\n<h2>What failed</h2>\n{table}\n<p class="muted">{note}</p>\n</section>'


def _facts(results: Sequence[dict[str, Any]]) -> str:
    versions = [result["versions"] for result in results if result["versions"]]
    packages = {
        f"{name} {version}" for found in versions for name, version in found.items() if version
    }
    facts = {
        "model": _listed(results, "model"),
        "data": _listed(results, "task"),
        "scored rows": _listed(results, "num_examples"),
        "device": _listed(results, "device"),
        "commit": _listed(results, "commit"),
        "versions": ", ".join(sorted(packages)),
    }
    return "\n".join(
        f"<dt>{name}</dt><dd>{escape(value) or '–'}</dd>" for name, value in facts.items()
    )


def _figure(name: str, svg: str) -> str:
    title = escape(_TITLES.get(name, name))
    # Ids are unique per figure only; two figures in one page must not use each other's clip paths
    # and markers.
    for mark in (' id="', ' xlink:href="#', "url(#"):
        svg = svg.replace(mark, f"{mark}{name}-")
    return f"<figure>\n<figcaption>{title}</figcaption>\n{svg}\n</figure>"


def _table(headings: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A sortable table. Headings: title, and whether the column is text; cells: finished tags."""
    head = "".join(
        f'<th scope="col" class="{"text" if is_text else "number"}">'
        f'<button type="button">{escape(title)}</button></th>'
        for title, is_text in headings
    )
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return (
        f'<div class="scroll">\n<table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _text(text: str, *, header: bool) -> str:
    value = escape(text)
    if header:  # a long method name may break at a bracket or comma, not within a word
        shown = value.replace("[", "<wbr/>[").replace(",", ",<wbr/>")
        return f'<th scope="row" data-value="{value}">{shown}</th>'
    return f'<td class="text" data-value="{value}">{value}</td>'


def _plain(number: float | None) -> str:
    return "" if number is None else f"{number:.10g}"


def _listed(results: Sequence[dict[str, Any]], field: str) -> str:
    """All values of a field, each once, in words."""
    found = dict.fromkeys(str(result[field]) for result in results if result.get(field) is not None)
    return ", ".join(found)
