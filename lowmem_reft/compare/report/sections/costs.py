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

_FORGETTING = (
    "Forgetting: how much the loss on general text has risen over that of the base stored the same "
    "way, in nats per token (at 0.1 each token of it has become 10 % less likely); below 0 it "
    "fell. The first half of each window is prompt, which ReFT edits as at inference; the second "
    "half is scored."
)
_TO_REFERENCE = (
    "To reference: seconds in training, optimizer steps and tokens through the model, with "
    "padding, until the first epoch whose validation score is at least the best of {name} "
    "({wanted}; of several seeds the lower median). Medians over the seeds, where one that never "
    "reached it took longer than all."
)


def render(comparison: Comparison) -> Section:
    """The table that the terminal shows too."""
    rows = comparison.rows
    parts = [table(shown(columns(rows)), rows, many="rows"), html.note(_NOTES)]
    if any(row.forgetting is not None for row in rows):
        parts.append(html.note(_FORGETTING))
    parts += map(html.note, _to_reference(comparison))
    return Section(name="measurements", title="All measurements", parts=parts)


def _to_reference(comparison: Comparison) -> list[str]:
    """What was to be reached, if anything was; of several tasks each has its own."""
    values = {row.task: row.reference_value for row in comparison.rows if row.reference_value}
    if not values or comparison.reference is None:
        return []
    wanted = ", ".join(
        f"{100 * value:.1f} %" + (f" on {task}" if len(comparison.tasks) > 1 else "")
        for task, value in values.items()
    )
    name = comparison.names[comparison.reference]
    return [_TO_REFERENCE.format(wanted=wanted, name=name)]
