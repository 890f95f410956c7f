"""Which examples one method gets and another misses, to read and to search.

The page holds the data (``examples``, JSON) and a script (``assets/examples.js``) that shows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowmem_reft.compare.report.answers import TaskAnswers
from lowmem_reft.compare.report.comparison import Comparison, ranked
from lowmem_reft.compare.report.html import Section, html
from lowmem_reft.compare.report.names import head

MAX_EXAMPLES = 2_000
"""Of each task in the page."""
MAX_CHARACTERS = 6_000_000
"""Of all tasks in the page, roughly."""
_MAX_PROMPT = 1_200
_MAX_ANSWER = 300
_WITHOUT_RIGHT = ("pearson", "spearman", "overlap", "loss")
"""Metrics of tasks in which no answer is simply right."""


def render(comparison: Comparison) -> Section | None:
    """The browser, if at least two methods left predictions on a task with right and wrong."""
    shown = {
        task: answers
        for task, answers in comparison.answers.items()
        if len(answers.methods) > 1 and answers.examples and answers.metric not in _WITHOUT_RIGHT
    }
    if not shown:
        return None
    room = MAX_CHARACTERS // len(shown)
    names, texts = comparison.names, comparison.texts
    tasks = [pack(answers, names, room, texts=texts) for answers in shown.values()]
    data = {"tasks": tasks, "pair": _first_pair(comparison), "texts": texts}
    lead = (
        "Which examples one method gets and the other misses. Over several seeds a method is right "
        "where more than half of its seeds are."
    )
    left_out = [f"{t} ({a.metric})" for t, a in comparison.answers.items() if t not in shown]
    if not comparison.texts:
        lead += " This page was written without the texts: examples are named by file and line."
    parts = [html.paragraph(lead), html.examples(data)]
    if left_out:
        words = f"Not here, as nothing is right or wrong in it: {', '.join(left_out)}."
        parts.append(html.note(words))
    return Section(name="examples-browser", title="Example by example", parts=parts)


def pack(
    answers: TaskAnswers, names: dict[str, str], max_characters: int, *, texts: bool = True
) -> dict[str, Any]:
    """One task as the script reads it: texts once, in a list, and numbers that point into it.

    An answer is ``2 * text + correct``; an example ``[source, prompt, reference, [[answer of each
    seed] of each method]]``. Examples on which methods disagree most come into the page first.
    Without ``texts`` every one of them is empty.
    """
    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(cut(text, _MAX_ANSWER) if texts else "", len(places))

    rows: dict[int, list[Any]] = {}
    size = 0
    for i in order_of_interest(answers)[:MAX_EXAMPLES].tolist():
        example = answers.examples[i]
        row = [
            example.source,
            cut(example.prompt, _MAX_PROMPT) if texts else "",
            place(example.reference_text),
            [
                [
                    2 * place(words[i]) + int(correct[i])
                    for words, correct in zip(method.texts, method.correct, strict=True)
                ]
                for method in answers.methods.values()
            ],
        ]
        size += len(row[1]) + 8 * sum(map(len, row[3])) + 40
        if size > max_characters and rows:
            break
        rows[i] = row
    return {
        "task": answers.task,
        "methods": [names[method] for method in answers.methods],
        "texts": list(places),
        "examples": [rows[i] for i in sorted(rows)],
        "total": len(answers.examples),
    }


def order_of_interest(answers: TaskAnswers) -> Any:
    """Indices of the examples: those that half of the methods get first, unanimous ones last."""
    right = np.mean(
        [method.correct.mean(axis=0) > 0.5 for method in answers.methods.values()], axis=0
    )
    return np.argsort(np.abs(right - 0.5), kind="stable")


def cut(text: str, max_characters: int) -> str:
    """The text without its middle if it is long: questions tend to stand at the end."""
    if len(text) <= max_characters:
        return text
    return f"{text[: max_characters // 3]} […] {text[-(max_characters - max_characters // 3) :]}"


def _first_pair(comparison: Comparison) -> Sequence[str]:
    """LoReFT (or the best method) against the reference."""
    rows = ranked(comparison.mean_rows or comparison.rows)
    others = [row.method for row in rows if row.method in comparison.tuned]
    others = [method for method in others if method != comparison.reference]
    one = next((m for m in others if head(m) == "loreft"), next(iter(others), None))
    return [comparison.names[m] for m in (one, comparison.reference) if m is not None]
