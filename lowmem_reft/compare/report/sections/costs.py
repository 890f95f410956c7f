"""Everything else that was measured of each method."""

from __future__ import annotations

from lowmem_reft.compare.report.comparison import Comparison
from lowmem_reft.compare.report.html import Section, html, shown, table
from lowmem_reft.compare.report.sections.curves import validation_metric
from lowmem_reft.compare.report.table import columns
from lowmem_reft.data.tasks.metrics import unit_of

_NOTES = (
    "Means over the seeds that finished; memory is their largest. Peak: tensors alive at once in "
    "training, weights included (on CUDA: allocated; reserved is what the card must hold). RSS: "
    "the whole process. Adapter: the weight file on disk. Train: without loading. Build: the store "
    "of frozen computation, once for all seeds."
)

_FORGETTING = (
    "Forgetting: how much the loss on general text has risen over that of the base stored the same "
    "way, in nats per token (at 0.1 each token of it has become 10 % less likely); below 0 it "
    "fell. The first half of each window is prompt, and the second half, which is scored, what "
    "comes after it; ReFT edits both at its positions, as at inference."
)
_TO_REFERENCE = (
    "To reference: seconds in training, optimizer steps and tokens through the model, with "
    "padding, until the first epoch whose validation score is no worse than the best of {name} "
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
    values = {
        row.task: row.reference_value for row in comparison.rows if row.reference_value is not None
    }
    if not values or comparison.reference is None:
        return []
    wanted = ", ".join(
        _written(comparison, task, value) + (f" on {task}" if len(comparison.tasks) > 1 else "")
        for task, value in values.items()
    )
    name = comparison.names[comparison.reference]
    return [_TO_REFERENCE.format(wanted=wanted, name=name)]


def _written(comparison: Comparison, task: str, value: float) -> str:
    unit = unit_of(validation_metric(comparison, task))
    return unit.text(value) + unit.sign
