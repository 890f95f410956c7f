"""Everything else that was measured of each method."""

from __future__ import annotations

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.html import Section, html, shown, table
from lowmem_reft.compare.report.table import columns

_NOTES = (
    "Means over the seeds that finished; memory is their largest. Peak: tensors alive at once in "
    "training, weights included (on CUDA: allocated; reserved is what the card must hold). RSS: "
    "the whole process. Adapter: the weight file on disk. Train: without loading. Build: the store "
    "of frozen computation, once for all seeds."
)


def render(comparison: Comparison) -> Section:
    """The table that the terminal shows too."""
    rows = comparison.rows
    body = table(shown(columns(rows)), rows, many="rows")
    return Section(name="measurements", title="All measurements", parts=[body, html.note(_NOTES)])
