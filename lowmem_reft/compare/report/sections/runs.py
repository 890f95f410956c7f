"""Every run, with the command that repeats it."""

from __future__ import annotations

from html import escape
from typing import Any

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.markup import (
    MANY_ROWS,
    Heading,
    Section,
    folded,
    number,
    row_name,
    scaled,
    table,
    text,
)

_COLUMNS = (
    ("value %", "value", 100.0, 1),
    ("validation %", "validation_value", 100.0, 1),
    ("best epoch", "best_epoch", 1.0, 0),
    ("eval loss", "loss", 1.0, 3),
    ("peak MiB", "peak_bytes", 2**-20, 1),
    ("train s", "train_time_s", 1.0, 0),
    ("wall s", "wall_time_s", 1.0, 0),
)
"""Heading, field of a result, scale and digits."""


def render(comparison: Comparison) -> Section:
    """One row per cell; many rows are folded away."""
    results = comparison.results
    several = len(comparison.tasks) > 1
    shown = [c for c in _COLUMNS if any(result.get(c[1]) is not None for result in results)]
    headings: list[Heading] = [("method", True), *([("task", True)] if several else [])]
    headings += [("seed", False), *((title, False) for title, *_ in shown)]
    headings.append(("how to repeat it", True))
    rows = (
        [
            row_name(result["method"]),
            *([text(result["task"])] if several else []),
            number(result["seed"], str(result["seed"])),
            *(_cell(result, *column[1:]) for column in shown),
            _command(result),
        ]
        for result in results
    )
    body = table(headings, rows)
    if len(results) > MANY_ROWS:
        body = folded(f"All {len(results)} runs", body)
    return Section(name="runs", title="Every run", body=body)


def _cell(result: dict[str, Any], name: str, scale: float, digits: int) -> str:
    if name == "value" and result["error"] is not None:
        return number(None, "failed", "bad")
    return scaled(result.get(name), scale, digits)


def _command(result: dict[str, Any]) -> str:
    command = escape(str(result["command"]))
    return (
        f'<td class="text" data-value="{command}"><details><summary>command</summary>'
        f"<code>{command}</code></details></td>"
    )
