"""Everything that the sections of a report draw from, gathered once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from lowmem_reft.compare.report.answers import TaskAnswers, read_answers
from lowmem_reft.compare.report.figures import Style, method_styles
from lowmem_reft.compare.report.names import find_reference, head, short_names
from lowmem_reft.compare.report.significance import Draws, Significance, score_draws
from lowmem_reft.compare.report.table import TASK, Measure, Summary, aggregate, over_tasks
from lowmem_reft.compare.report.verdict import Verdict, decide
from lowmem_reft.data.tasks.metrics import gain, unit_of

MAX_NAME = 24
"""Characters of a method's name in a chart."""
_MAX_TASKS_IN_TITLE = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """The results of a comparison and what follows from them."""

    results: Sequence[dict[str, Any]]
    """The cells, as in ``results.json``."""
    rows: Sequence[Summary]
    """Methods with means over seeds, one per method and task."""
    answers: dict[str, TaskAnswers]
    """By task; only tasks whose cells have predictions."""
    texts: bool = True
    """Whether the page may hold the texts of the examples."""

    @classmethod
    def read(
        cls, results: Sequence[dict[str, Any]], directory: Path, *, texts: bool = True
    ) -> Comparison:
        """Aggregate the cells and read their predictions, which are relative to ``directory``."""
        answers = read_answers(results, directory)
        return cls(results=results, rows=aggregate(results), answers=answers, texts=texts)

    @cached_property
    def tasks(self) -> list[str]:
        """Every task, in the order in which it first occurs."""
        return list(dict.fromkeys(row.task for row in self.rows))

    @property
    def task_column(self) -> list[Measure]:
        """Nothing, if there is one task."""
        return [TASK] if len(self.tasks) > 1 else []

    def rows_of(self, task: str) -> list[Summary]:
        """The methods on a task, in the order in which they first occur."""
        return [row for row in self.rows if row.task == task]

    def listed(self, name: str) -> str:
        """All values of a field of the results, each once, in words."""
        found = (str(result[name]) for result in self.results if result.get(name) is not None)
        return ", ".join(dict.fromkeys(found))

    @property
    def title(self) -> str:
        """Tasks and model."""
        is_long = len(self.tasks) > _MAX_TASKS_IN_TITLE
        tasks = f"{len(self.tasks)} tasks" if is_long else ", ".join(self.tasks)
        return f"{tasks} on {PurePath(self.listed('model')).name}"

    @property
    def summary(self) -> str:
        """How many methods, tasks, seeds and runs, where, and what all were given the same of."""
        num_failed = sum(result["error"] is not None for result in self.results)
        num_seeds = len({result["seed"] for result in self.results})
        untrained = {row.method for row in self.rows if row.num_trainable_params == 0}
        num_methods = len({row.method for row in self.rows} - untrained)
        budgets = dict.fromkeys(_budget(r["budget"]) for r in self.results if r.get("budget"))
        words = (
            f"{num_methods} {'method' if num_methods == 1 else 'methods'}",
            f"{len(self.tasks)} tasks" if len(self.tasks) > 1 else "",
            f"{num_seeds} {'seed' if num_seeds == 1 else 'seeds'}",
            f"{len(self.results)} runs",
            f"{num_failed} failed" if num_failed else "",
            self.listed("device"),
            f"equal budget: {'; '.join(budgets)}" if budgets else "",
        )
        return " · ".join(word for word in words if word)

    @cached_property
    def mean_rows(self) -> list[Summary]:
        """Methods over all tasks; empty for a single task."""
        return over_tasks(self.results) if len(self.tasks) > 1 else []

    @cached_property
    def names(self) -> dict[str, str]:
        """Every method's short name."""
        return short_names(row.method for row in self.rows)

    def chart_name(self, method: str, place: int) -> str:
        """The name in a chart: the short one, or if that is long, with the place in the ranking."""
        short = self.names[method]
        return short if len(short) <= MAX_NAME else f"{head(method)} ({place})"

    @cached_property
    def chart_names(self) -> dict[str, str]:
        """Names for a chart over all tasks, with the places of the first ranking."""
        placed = {row.method: i for i, row in enumerate(ranked(self.mean_rows or self.rows), 1)}
        return {
            method: self.chart_name(method, placed[method]) if method in placed else short
            for method, short in self.names.items()
        }

    @cached_property
    def tuned(self) -> list[str]:
        """The methods that train something, in the order in which they first occur."""
        return list(dict.fromkeys(row.method for row in self.rows if row.num_trainable_params))

    @cached_property
    def prompted(self) -> list[str]:
        """The bases with examples before their prompts, in the order in which they first occur."""
        return list(dict.fromkeys(r["method"] for r in self.results if r.get("examples")))

    @cached_property
    def styles(self) -> dict[str, Style]:
        """Colour and marker of every method that trains something."""
        return method_styles(self.tuned)

    @cached_property
    def reference(self) -> str | None:
        """What the others are compared with: the first qlora, or the first that was tuned."""
        return find_reference(self.tuned)

    @cached_property
    def draws(self) -> dict[str, Draws]:
        """By task: every method that has answers, on the same draws of the task's examples."""
        scored = {
            task: score_draws(answers, [row.method for row in self.rows_of(task)])
            for task, answers in self.answers.items()
        }
        return {task: draws for task, draws in scored.items() if draws is not None}

    @cached_property
    def significance(self) -> dict[str, Significance]:
        """By task: what is tuned or prompted, and has answers, against the reference, if it has."""
        if self.reference is None:
            return {}
        compared = {
            task: draws.against(self.reference, [*self.tuned, *self.prompted])
            for task, draws in self.draws.items()
        }
        return {task: found for task, found in compared.items() if found is not None}

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """Which method to take: over all tasks first, if there are several, then on each."""
        return decide(self)


def _budget(budget: Any) -> str:
    if isinstance(budget, dict):
        return ", ".join(f"{name} {value}" for name, value in budget.items())
    return str(budget)


def ranked(rows: Sequence[Summary]) -> list[Summary]:
    """Rows by value, the best first; those without one last."""

    def place(row: Summary) -> tuple[bool, float, str]:
        return row.value_mean is None, -gain(row.metric, row.value_mean or 0.0), row.method

    return sorted(rows, key=place)


def mean_text(row: Summary) -> str:
    """The value in its unit, with its deviation over seeds if there are several."""
    if row.value_mean is None:
        return "failed" if row.errors else "–"
    unit = unit_of(row.metric)
    deviation = "" if row.value_sd is None else f" ± {unit.text(row.value_sd)}"
    return f"{unit.text(row.value_mean)}{deviation}"
