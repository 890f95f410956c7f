"""Which method is best: values over seeds, and whether the difference is more than chance."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lowmem_reft.compare.report.comparison import Comparison, mean_text, ranked
from lowmem_reft.compare.report.markup import (
    Heading,
    Section,
    folded,
    note,
    number,
    p_value,
    row_name,
    scaled,
    signed,
    table,
)
from lowmem_reft.compare.report.significance import LEVEL, Difference, Significance
from lowmem_reft.compare.report.table import Row

_Cost = tuple[str, str, float, int]
"""Heading, field of ``Row``, scale and digits."""
_COSTS: tuple[_Cost, ...] = (
    ("trainable", "num_trainable_params", 1.0, 0),
    ("peak MiB", "peak_bytes", 2**-20, 1),
    ("train s", "train_time_s", 1.0, 0),
)


def render(comparison: Comparison) -> Section:
    """The ranking of each task; with several tasks, all of them at a glance first."""
    parts = []
    if comparison.mean_rows:
        parts.append(_overview(comparison))
    for task in comparison.tasks:
        body = _task_ranking(comparison, task)
        parts.append(body if len(comparison.tasks) == 1 else folded(task, body))
    parts += [note(sentence) for sentence in _notes(comparison)]
    return Section(name="ranking", title="Ranking", body="\n".join(parts))


def _task_ranking(comparison: Comparison, task: str) -> str:
    rows = ranked([row for row in comparison.rows if row.task == task])
    found = comparison.significance.get(task)
    metric = next((row.metric for row in rows if row.metric), "value")
    headings: list[Heading] = [("method", True), (f"{metric} %", False), ("seeds", False)]
    if found is not None:
        reference = comparison.names[found.reference]
        headings += [(f"against {reference}", False), ("95 % interval", False), ("p, Holm", False)]
    costs = _measured(rows)
    headings += [(title, False) for title, *_ in costs]
    cells = []
    for rank, row in enumerate(rows, 1):
        cells.append(
            [
                row_name(row.method, rank if row.value_mean is not None else None),
                _value(row),
                number(row.num_seeds, str(row.num_seeds)),
                *(_difference(row, found) if found is not None else ()),
                *_costs(row, costs),
            ]
        )
    lead = f"<p>{escape(_verdict(comparison, found))}</p>\n" if found is not None else ""
    return lead + table(headings, cells, by=1)


def _overview(comparison: Comparison) -> str:
    """Methods by tasks; the mean only of methods that finished all of them."""
    means = {row.method: row for row in comparison.mean_rows}
    by_place = {(row.method, row.task): row for row in comparison.rows}
    metrics = {row.task: row.metric for row in comparison.rows if row.metric}
    headings: list[Heading] = [("method", True), ("mean %", False)]
    headings += [(f"{task}, {metrics.get(task, '–')}", False) for task in comparison.tasks]
    costs = _measured(comparison.mean_rows)
    headings += [(title, False) for title, *_ in costs]
    order = [row.method for row in ranked(list(means.values()))]
    failed = {row.method for row in comparison.rows if row.errors} - means.keys()
    partly = [m for m in comparison.names if m not in means and m not in failed]

    def line(method: str, rank: int | None) -> list[str]:
        mean = means.get(method)
        return [
            row_name(method, rank),
            _value(mean) if mean else number(None),
            *(
                _overview_cell(comparison, by_place.get((method, task)))
                for task in comparison.tasks
            ),
            *_costs(mean, costs),
        ]

    ranks = [line(method, rank) for rank, method in enumerate(order, 1)]
    body = table(headings, ranks + [line(m, None) for m in comparison.names if m in failed], by=1)
    if partly:
        rest = table(headings, [line(method, None) for method in partly])
        body += folded(f"{len(partly)} that were not run on every task", rest)
    return body


def _overview_cell(comparison: Comparison, row: Row | None) -> str:
    if row is None or row.value_mean is None:
        return number(None, "failed", "bad") if row and row.errors else number(None)
    found = comparison.significance.get(row.task)
    difference = found.differences.get(row.method) if found else None
    sign, css = _sign(difference)
    return number(100 * row.value_mean, f"{sign}{100 * row.value_mean:.1f}", css)


def _measured(rows: Sequence[Row]) -> list[_Cost]:
    return [cost for cost in _COSTS if any(getattr(row, cost[1]) is not None for row in rows)]


def _costs(row: Row | None, costs: Sequence[_Cost]) -> list[str]:
    return [
        scaled(getattr(row, name) if row else None, scale, digits)
        for _, name, scale, digits in costs
    ]


def _value(row: Row) -> str:
    value = None if row.value_mean is None else 100 * row.value_mean
    return number(value, mean_text(row), "value" if value is not None else "bad")


def _difference(row: Row, found: Significance) -> Sequence[str]:
    if row.method == found.reference:
        return number(0.0, "reference", "muted"), number(None), number(None)
    difference = found.differences.get(row.method)
    if difference is None:
        return number(None), number(None), number(None)
    sign, css = _sign(difference)
    low, high = signed(100 * difference.low), signed(100 * difference.high)
    return (
        number(100 * difference.value, f"{sign}{signed(100 * difference.value)}", css),
        number(difference.low, f"{low} to {high}"),
        number(difference.p_holm, p_value(difference.p_holm), css),
    )


def _sign(difference: Difference | None) -> tuple[str, str]:
    """Mark and class of a clear difference; nothing for any other."""
    if difference is None or not difference.is_clear:
        return "", ""
    return ("▲ ", "good") if difference.value > 0 else ("▼ ", "bad")


def _verdict(comparison: Comparison, found: Significance) -> str:
    """The table in a few words."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "even": []}
    for method, difference in found.differences.items():
        side = "better" if difference.value > 0 else "worse"
        groups[side if difference.is_clear else "even"].append(comparison.names[method])
    reference = comparison.names[found.reference]
    parts = (
        (f"Clearly better than {reference}", groups["better"]),
        (f"Clearly worse than {reference}", groups["worse"]),
        (f"Not told apart from {reference}", groups["even"]),
    )
    listed = ". ".join(f"{words}: {', '.join(names)}" for words, names in parts if names)
    return f"{listed}. ({found.num_examples:,} examples)"


def _notes(comparison: Comparison) -> list[str]:
    notes = [
        "Values are means over the seeds that finished, ± sample standard deviation over them."
    ]
    found = list(comparison.significance.values())
    if comparison.mean_rows:
        notes[0] += (
            " The mean over tasks is of methods that finished every task; its ± is that of the "
            "seeds' means."
        )
    if found:
        draws = min(each.num_resamples for each in found)
        reference = comparison.names[found[0].reference]
        notes.append(
            f"▲ ▼: better or worse than {reference} at p < {LEVEL}, after Holm's correction for "
            "several methods. Differences are in points; interval and p are of a paired bootstrap "
            f"over the test examples ({draws:,} draws, both methods on the same ones, the mean "
            "over seeds on each). They say how far the difference would move with other examples "
            "of this kind. Other seeds move it too: for those look at the ±, and do not trust a "
            "difference that is smaller."
        )
    elif comparison.reference and len(comparison.tuned) > 1:
        notes.append(
            "No significance: the runs left no predictions from which the metric could be computed."
        )
    return notes
