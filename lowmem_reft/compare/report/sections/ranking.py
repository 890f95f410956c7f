"""Which method is best: values over seeds, and whether the difference is more than chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from markupsafe import Markup

from lowmem_reft.compare.report.comparison import Comparison, mean_text, ranked
from lowmem_reft.compare.report.html import Column, Section, folded, html, shown, table
from lowmem_reft.compare.report.significance import LEVEL, Significance
from lowmem_reft.compare.report.table import Measure, Summary, measured, titled
from lowmem_reft.data.tasks.metrics import Unit, gain, is_lower_better, unit_of

_COSTS = (
    Measure("trainable", "num_trainable_params"),
    Measure("adapter KiB", "adapter_bytes", 2**-10, 1),
    Measure("peak MiB", "peak_bytes", 2**-20, 1),
    Measure("train s", "train_time_s"),
    Measure("forgetting", "forgetting", 1.0, 3),
)


def render(comparison: Comparison) -> Section:
    """The ranking of each task; with several tasks, all of them at a glance first."""
    if comparison.mean_rows:
        parts = _overview(comparison)
        parts += [folded(task, *_task_ranking(comparison, task)) for task in comparison.tasks]
    else:
        parts = [part for task in comparison.tasks for part in _task_ranking(comparison, task)]
    parts += [html.note(sentence) for sentence in _notes(comparison)]
    return Section(name="ranking", title="Ranking", parts=parts)


def _task_ranking(comparison: Comparison, task: str) -> list[Markup]:
    rows = ranked(comparison.rows_of(task))
    found = comparison.significance.get(task)
    metric = next((row.metric for row in rows if row.metric), "value")
    ranks = {row.method: i for i, row in enumerate(rows, 1) if row.value_mean is not None}
    columns = [
        Column("method", lambda row: html.method(row.method, ranks.get(row.method)), "text"),
        Column(titled(metric, [metric]), _value),
    ]
    costs = shown(measured((Measure("seeds", "num_seeds"), *_COSTS), rows))
    rising = is_lower_better(metric)
    if found is None:
        return [table([*columns, *costs], rows, by=1, rising=rising)]
    titles = (f"against {comparison.names[found.reference]}", "95 % interval", "p, Holm")
    for i, title in enumerate(titles):
        columns.append(Column(title, partial(_against, found, i)))
    lead = html.paragraph(_verdict(comparison, found))
    return [lead, table([*columns, *costs], rows, by=1, rising=rising)]


def _overview(comparison: Comparison) -> list[Markup]:
    """Methods by tasks; the mean only of methods that finished all of them."""
    means = {row.method: row for row in ranked(comparison.mean_rows)}
    ranks = {method: rank for rank, method in enumerate(means, 1)}
    metrics = {row.task: row.metric for row in comparison.rows if row.metric}
    failed = {row.method for row in comparison.rows if row.errors} - means.keys()
    partly = [m for m in comparison.names if m not in means and m not in failed]
    mean_metrics = {row.metric for row in comparison.mean_rows}
    rising = all(map(is_lower_better, mean_metrics))
    columns = [
        Column("method", lambda method: html.method(method, ranks.get(method)), "text"),
        Column(titled("mean", mean_metrics), lambda method: _value(means.get(method))),
    ]
    for task in comparison.tasks:
        scores = {row.method: row for row in comparison.rows_of(task)}
        found = comparison.significance.get(task)
        title = f"{task}, {metrics.get(task, '–')}"
        columns.append(Column(title, partial(_score, scores, found)))
    for title, cell, _ in shown(measured(_COSTS, comparison.mean_rows)):
        columns.append(Column(title, partial(_of_mean, means, cell)))
    items = [*means, *(m for m in comparison.names if m in failed)]
    parts = [table(columns, items, by=1, rising=rising)]
    if partly:
        rest = table(columns, partly)
        parts.append(folded(f"{len(partly)} that were not run on every task", rest))
    return parts


def _of_seeds(comparison: Comparison) -> str:
    """What can be said of other seeds, by how many there are of what is trained."""
    tuned = [row for row in comparison.rows if row.method in comparison.tuned and row.num_seeds]
    most = max((row.num_seeds for row in tuned), default=0)
    if most == 1:
        return (
            "One seed: nothing here says how far another one would move a value; --seeds 0,1,2 "
            "would."
        )
    fewer = {comparison.names[row.method]: row.num_seeds for row in tuned if row.num_seeds < most}
    words = "How far seeds move a value is told by its ±: trust no difference that is smaller."
    listed = ", ".join(f"{name} ({number})" for name, number in fewer.items())
    return words + (f" With fewer than {most} seeds: {listed}." if fewer else "") if most else ""


def _of_examples(comparison: Comparison, method: str) -> str:
    """What was put before the prompts of a base."""
    cells = [result for result in comparison.results if result["method"] == method]
    words = (
        f"{method}: the base, untrained, with {len(cells[0]['examples'])} solved training rows "
        "before each prompt, which each seed draws."
    )
    short = sum((cell.get("few_shot") or {}).get("num_short", 0) for cell in cells)
    if short:
        scored = sum(cell["num_examples"] or 0 for cell in cells)
        words += f" {short:,} of {scored:,} prompts have fewer, for want of room in --max-length."
    return words


def _of_mean(means: dict[str, Summary], cell: Callable[[Any], Markup], method: str) -> Markup:
    return cell(means.get(method))


def _score(scores: dict[str, Summary], found: Significance | None, method: str) -> Markup:
    row = scores.get(method)
    if row is None or row.value_mean is None:
        return html.number(None, "failed", "bad") if row and row.errors else html.number(None)
    sign, css = _sign(found, row.method)
    unit = unit_of(row.metric)
    return html.number(unit.scale * row.value_mean, f"{sign}{unit.text(row.value_mean)}", css)


def _value(row: Summary | None) -> Markup:
    if row is None:
        return html.number(None)
    if row.value_mean is None:
        return html.number(None, mean_text(row), "bad")
    return html.number(unit_of(row.metric).scale * row.value_mean, mean_text(row), "value")


def _against(found: Significance, which: int, row: Summary) -> Markup:
    """The difference, its interval or its p."""
    if row.method == found.reference and which == 0:
        return html.number(0.0, "reference", "muted")
    difference = found.differences.get(row.method)
    if difference is None:
        return html.number(None)
    sign, css = _sign(found, row.method)
    unit = unit_of(found.metric)
    value, low, high = (
        _signed(each, unit) for each in (difference.value, difference.low, difference.high)
    )
    return (
        html.number(unit.scale * difference.value, f"{sign}{value}", css),
        html.number(difference.low, f"{low} to {high}"),
        html.number(difference.p_holm, _p_value(difference.p_holm), css),
    )[which]


def _sign(found: Significance | None, method: str) -> tuple[str, str]:
    """Mark and class of a clear difference; nothing for any other."""
    difference = found.differences.get(method) if found else None
    if found is None or difference is None or not difference.is_clear:
        return "", ""
    return ("▲ ", "good") if gain(found.metric, difference.value) > 0 else ("▼ ", "bad")


def _signed(value: float, unit: Unit) -> str:
    """A difference with its sign; nothing is written as minus nought."""
    rounded = unit.text(abs(value))
    return rounded if float(rounded) == 0 else f"{'+' if value > 0 else '−'}{rounded}"


def _p_value(p: float) -> str:
    """A p-value with the digits that mean something."""
    return "< 0.001" if p < 0.001 else f"{p:.{3 if p < 0.1 else 2}f}"


def _verdict(comparison: Comparison, found: Significance) -> str:
    """The table in a few words."""
    groups: dict[str, list[str]] = {"▲ ": [], "▼ ": [], "": []}
    for method in found.differences:
        groups[_sign(found, method)[0]].append(comparison.names[method])
    words = ("Clearly better than", "Clearly worse than", "Not told apart from")
    reference = comparison.names[found.reference]
    sentences = (
        f"{each} {reference}: {', '.join(methods)}"
        for each, methods in zip(words, groups.values(), strict=True)
        if methods
    )
    return f"{'. '.join(sentences)}. ({found.num_examples:,} examples)"


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
        if len({is_lower_better(row.metric) for row in comparison.rows if row.metric}) > 1:
            notes[0] += " Tasks whose metric is the loss have no part in it."
    if found:
        draws = min(each.num_resamples for each in found)
        reference = comparison.names[found[0].reference]
        notes.append(
            f"▲ ▼: better or worse than {reference} at p < {LEVEL}, after Holm's correction for "
            "several methods. Differences are in points, of the loss in nats; interval and p are "
            f"of a paired bootstrap over the test examples ({draws:,} draws, both methods on the "
            "same ones, the mean over seeds on each). They say how far the difference would move "
            "with other examples of this kind. Other seeds move it too."
        )
    if seeds := _of_seeds(comparison):
        notes.append(seeds)
    notes += [_of_examples(comparison, method) for method in comparison.prompted]
    if not found and comparison.reference and len(comparison.tuned) > 1:
        notes.append(
            "No significance: the runs left no predictions from which the metric could be computed."
        )
    return notes
