"""Which method to take, in a sentence for each task and one for all.

Level with the best is every method that the paired bootstrap does not tell apart from it, with
Holm's correction for all methods of the task (``significance.py``). The cheapest of these is taken:
by trained parameters, the adapter's bytes, peak memory and training time, in this order, where what
is within ``SAME`` of the least counts as no more. The base is one of the methods, as it is and
prompted: where training does not beat it, it is what to take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lowmem_reft.compare.report.names import head
from lowmem_reft.compare.report.significance import Significance
from lowmem_reft.compare.report.table import ALL_TASKS, Summary
from lowmem_reft.data.tasks.metrics import gain, is_lower_better, unit_of

if TYPE_CHECKING:
    from lowmem_reft.compare.report.comparison import Comparison

SAME = 0.05
"""Share of the least by which a cost may be higher and count as no higher."""
_BESIDE = ("qlora", "lora")
"""What is taken is measured beside the first of these that is there."""

_BITS: dict[str | None, int] = {"nf4": 4, "fp4": 4, "int8": 8, "bf16": 16, "fp16": 16, "fp32": 32}


@dataclass(frozen=True)
class Verdict:
    """What to take on one task, or on all."""

    task: str
    take: str | None
    """A method, as it is called in the results; None if none has finished."""
    reason: str

    def sentence(self, *, names_task: bool) -> str:
        """The verdict in words."""
        start = f"On {self.task} " if names_task else ""
        said = "nothing can be taken" if self.take is None else f"take {self.take}"
        return f"{start}{said if start else said.capitalize()[0] + said[1:]}: {self.reason}."


class _Level(NamedTuple):
    """The methods that are level with the best of a task."""

    best: Summary
    rows: list[Summary]
    """The best among them."""
    found: Significance | None
    """The others against the best; None if chance could not be tested."""


def decide(comparison: Comparison) -> list[Verdict]:
    """Which method to take: over all tasks first, if there are several, then on each."""
    levels = {task: _level(comparison, task) for task in comparison.tasks}
    found = [_on_task(comparison, task, level) for task, level in levels.items()]
    return [_over_tasks(comparison, levels), *found] if len(found) > 1 else found


def sentences(verdicts: Sequence[Verdict]) -> list[str]:
    """Every verdict in words; a task that is alone is not named."""
    return [verdict.sentence(names_task=len(verdicts) > 1) for verdict in verdicts]


def _level(comparison: Comparison, task: str) -> _Level | None:
    """None if no method has finished."""
    rows = {row.method: row for row in _finished(comparison, task)}
    if not rows:
        return None
    draws = comparison.draws.get(task)
    tested = [method for method in rows if draws is not None and method in draws.scores]
    if draws is not None and len(tested) > 1:
        best = max(tested, key=lambda method: gain(draws.metric, draws.value(method)))
        found = draws.against(best, tested)
        assert found is not None
        level = [best, *(m for m, each in found.differences.items() if not each.is_clear)]
        return _Level(rows[best], [rows[method] for method in level], found)
    first = max(rows.values(), key=_gain)
    return _Level(first, [row for row in rows.values() if _gain(row) == _gain(first)], None)


def _on_task(comparison: Comparison, task: str, level: _Level | None) -> Verdict:
    if level is None:
        return Verdict(task, None, "no method has finished")
    rows = _finished(comparison, task)
    taken, why = _cheapest(comparison, level.rows)
    is_alone = len(rows) == 1
    words = [_alone(comparison, taken) if is_alone else _as_good(comparison, taken, level, why)]
    if level.found is not None:
        tested = (level.best.method, *level.found.differences)
        untested = [comparison.names[row.method] for row in rows if row.method not in tested]
        if untested:
            words.append(f"{', '.join(untested)} left no answers to compare and could not be taken")
    words += _beside(comparison, taken, rows)
    return Verdict(task, taken.method, "; ".join(words))


def _alone(comparison: Comparison, taken: Summary) -> str:
    return f"nothing else has finished; {_its_value(taken)} ({_seeds(comparison, taken.task)})"


def _as_good(comparison: Comparison, taken: Summary, level: _Level, why: str) -> str:
    """How good it is beside the others, how sure that is, and what decided among equals."""
    num, seeds = len(level.rows), _seeds(comparison, taken.task)
    best = f"{_value(level.best)} of {comparison.names[level.best.method]}"
    among = f"; of the {num} that are level it {why}" if num > 1 else ""
    if level.found is None:
        return (
            f"{_its_value(taken)} is the best, but chance could not be tested, for want of answers "
            f"({seeds}){among}"
        )
    tested = f"{level.found.num_examples:,} rows and {seeds}"
    if not taken.num_trainable_params and comparison.tuned:
        bases = [row for row in level.rows if not row.num_trainable_params]
        among = f"; of the {len(bases)} bases that are level it {why}" if len(bases) > 1 else ""
        if level.best is taken:
            return f"no training beat it: {_its_value(taken)} is the best, by {tested}{among}"
        return (
            f"no training beat it: the best, {best}, is not told apart from its {_value(taken)} "
            f"with {tested}{among}"
        )
    if num == 1:
        return f"{_its_value(taken)} is clearly the best, by {tested}"
    if level.best is not taken:
        return f"{_its_value(taken)} is not told apart from the best, {best}, with {tested}{among}"
    others = ", ".join(comparison.names[row.method] for row in level.rows if row is not taken)
    return f"{_its_value(taken)} is the best, not told apart from {others} with {tested}{among}"


def _over_tasks(comparison: Comparison, levels: dict[str, _Level | None]) -> Verdict:
    """What is level with the best on every task; if nothing is, the best mean."""
    rows, num_tasks = comparison.mean_rows, len(levels)
    if not rows:
        return Verdict(ALL_TASKS, None, "no method has finished every task")
    level = [[row.method for row in each.rows] for each in levels.values() if each is not None]
    everywhere = [r for r in rows if sum(r.method in each for each in level) == num_tasks]
    if everywhere:
        taken, why = _cheapest(comparison, everywhere)
        among = f"; of the {len(everywhere)} that are it {why}" if len(everywhere) > 1 else ""
        reason = f"it is level with the best on each of the {num_tasks} tasks{among}"
        if not taken.num_trainable_params and comparison.tuned:
            reason = f"no training beat it: {reason}"
    else:
        taken = max(rows, key=_gain)
        num_level = sum(taken.method in each for each in level)
        reason = (
            f"{_its_value(taken)} is the best mean; nothing is level with the best on every task, "
            f"and it is on {num_level} of {num_tasks}"
        )
    return Verdict(ALL_TASKS, taken.method, "; ".join([reason, *_beside(comparison, taken, rows)]))


def _cheapest(comparison: Comparison, rows: Sequence[Summary]) -> tuple[Summary, str]:
    """The cheapest row, and by what; of equal costs the best value decides.

    A cost that is not known of all that are left decides nothing. What is not trained has no
    measured memory: there the bits of the storage tell.
    """
    storages = {result["method"]: result.get("storage") for result in comparison.results}

    def bits(row: Summary) -> int | None:
        return None if row.num_trainable_params else _BITS.get(storages.get(row.method))

    costs: tuple[tuple[str, Callable[[Summary], float | None]], ...] = (
        ("trains the fewest parameters", lambda row: row.num_trainable_params),
        ("has the smallest adapter", lambda row: row.adapter_bytes),
        ("needs no examples in its prompts", lambda row: row.method in comparison.prompted),
        ("is stored in the fewest bits", bits),
        ("trains in the least memory", lambda row: row.peak_bytes),
        ("trains in the least time", lambda row: row.train_time_s),
    )
    left, decided = list(rows), "has the best value"
    for words, cost in costs:
        known = [(found, row) for row in left if (found := cost(row)) is not None]
        if len(known) == len(left):
            least = min(found for found, _ in known)
            kept = [row for found, row in known if found <= (1 + SAME) * least]
            if len(kept) < len(left):
                left, decided = kept, words
    if len(left) > 1:
        decided = "has the best value of those that cost the least"
    return max(left, key=_gain), decided


def _beside(comparison: Comparison, taken: Summary, rows: Sequence[Summary]) -> list[str]:
    """The distance from QLoRA, LoRA or, where that is taken itself, the best of the others."""
    others = [row for row in rows if row.num_trainable_params and row is not taken]
    named = [
        row for name in _BESIDE for row in others if head(row.method) == name != head(taken.method)
    ]
    if not others:
        return []
    other = next(iter(named), max(others, key=_gain))
    words = [_distance(comparison, taken, other)]
    words.append(_against("{:,.0f} trained parameters", 1, taken, other, "num_trainable_params"))
    if taken.num_trainable_params:
        words.append(_against("{:,.1f} MiB of peak memory", 2**-20, taken, other, "peak_bytes"))
        words.append(_against("{:,.1f} s of training", 1.0, taken, other, "train_time_s"))
    return [f"beside {comparison.names[other.method]} {', '.join(filter(None, words))}"]


def _against(words: str, scale: float, taken: Summary, other: Summary, field: str) -> str:
    """Both costs; nothing where one is not known."""
    own, its = getattr(taken, field), getattr(other, field)
    if own is None or its is None:
        return ""
    number, _, unit = words.partition(" ")
    return f"{number.format(scale * own)} {unit} against {number.format(scale * its)}"


def _distance(comparison: Comparison, taken: Summary, other: Summary) -> str:
    """The difference of the values, in words that say which way is better."""
    draws, methods = comparison.draws.get(taken.task), {taken.method, other.method}
    if draws is not None and methods <= draws.scores.keys():
        difference = draws.value(taken.method) - draws.value(other.method)
    else:
        difference = (taken.value_mean or 0.0) - (other.value_mean or 0.0)
    text = unit_of(taken.metric).text(abs(difference))
    if float(text) == 0:
        return "as good"
    unit = "nats per token" if is_lower_better(taken.metric) else "points"
    return f"{text} {unit} {'better' if gain(taken.metric, difference) > 0 else 'worse'}"


def _finished(comparison: Comparison, task: str) -> list[Summary]:
    return [row for row in comparison.rows_of(task) if row.value_mean is not None]


def _gain(row: Summary) -> float:
    return gain(row.metric, row.value_mean or 0.0)


def _value(row: Summary) -> str:
    unit = unit_of(row.metric)
    return f"{unit.text(row.value_mean)}{unit.sign}"


def _its_value(row: Summary) -> str:
    return f"its {row.metric or 'value'} of {_value(row)}"


def _seeds(comparison: Comparison, task: str) -> str:
    """How many seeds the trained methods of a task have, or all, where none is trained."""
    rows = _finished(comparison, task)
    trained = [row.num_seeds for row in rows if row.num_trainable_params]
    fewest, most = (pick(trained or [row.num_seeds for row in rows]) for pick in (min, max))
    if most == 1:
        return "one seed"
    return f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
