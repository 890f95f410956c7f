"""What failed, and why."""

from __future__ import annotations

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.markup import Section, note, row_name, table, text


def render(comparison: Comparison) -> Section | None:
    """A row for each reason; nothing if all runs finished."""
    several = len(comparison.tasks) > 1
    failed = [
        [row_name(row.method), *([text(row.task)] if several else []), text(error, "bad")]
        for row in comparison.rows
        for error in row.errors
    ]
    if not failed:
        return None
    headings = [("method", True), *([("task", True)] if several else []), ("error", True)]
    body = table(headings, failed) + note(
        "The full output of a run is in its directory, in log.txt."
    )
    return Section(name="failures", title="What failed", body=body)
