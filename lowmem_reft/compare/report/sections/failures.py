"""What failed, and why."""

from __future__ import annotations

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.html import Column, Section, html, shown, table
from lowmem_reft.compare.report.table import METHOD


def render(comparison: Comparison) -> Section | None:
    """A row for each reason; nothing if all runs finished."""
    failed = [
        {"method": row.method, "task": row.task, "error": error}
        for row in comparison.rows
        for error in row.errors
    ]
    if not failed:
        return None
    error = Column("error", lambda each: html.text(each["error"], "bad"), "text")
    body = table([*shown([METHOD, *comparison.task_column]), error], failed)
    note = html.note("The full output of a run is in its directory, in log.txt.")
    return Section(name="failures", title="What failed", parts=[body, note])
