"""Everything else that was measured of each method."""

from __future__ import annotations

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.markup import (
    MANY_ROWS,
    Section,
    folded,
    note,
    number,
    row_name,
    table,
    text,
)
from lowmem_reft.compare.report.table import Column, Row, columns

_NOTES = (
    "Means over the seeds that finished; memory is their largest. Peak: tensors alive at once in "
    "training, weights included (on CUDA: allocated; reserved is what the card must hold). RSS: "
    "the whole process. Adapter: the weight file on disk. Train: without loading. Build: the store "
    "of frozen computation, once for all seeds."
)


def render(comparison: Comparison) -> Section:
    """The table that the terminal shows too."""
    shown = columns(comparison.rows)
    body = table(
        [(column.title, column.kind == "text") for column in shown],
        ([_cell(column, row) for column in shown] for row in comparison.rows),
    )
    if len(comparison.rows) > MANY_ROWS:
        body = folded(f"All {len(comparison.rows)} rows", body)
    return Section(name="measurements", title="All measurements", body=body + note(_NOTES))


def _cell(column: Column, row: Row) -> str:
    words = column.text(row)
    if column.kind == "text":
        return row_name(words) if column.field == "method" else text(words)
    return number(column.number(row), words, "bad" if words == "failed" else "")
