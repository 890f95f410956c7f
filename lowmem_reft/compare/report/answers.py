"""What every method answered, example by example, as the cells' ``predictions.jsonl`` have it."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowmem_reft.machine.files import parse_json

Key = tuple[str, int]
"""An example: name of its file with the line, and which of the lines from there it is."""
_Lines = dict[Key, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One example of a task."""

    source: str
    """Name of the file and line it is from; directories are the run's own, and may have moved."""
    prompt: str
    reference: Any
    """What is right: the index of a choice, a number or a text."""
    reference_text: str
    """The same in words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MethodAnswers:
    """One method's answers; the rows are its seeds, the columns the examples of the task."""

    seeds: tuple[int, ...]
    values: tuple[float | None, ...]
    """The metric of each seed, as its cell measured it."""
    correct: NDArray[np.bool_]
    predictions: list[list[Any]]
    texts: list[list[str]]
    """The predictions in words."""
    losses: NDArray[np.float64] | None = None
    """Of each example, summed over its tokens; NaN where it is not known."""
    num_tokens: NDArray[np.float64] | None = None
    """Tokens that each loss is summed over."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskAnswers:
    """One task: the examples that every method answered, and the answers."""

    task: str
    metric: str
    examples: list[Example]
    methods: dict[str, MethodAnswers]
    num_left_out: int
    """Examples that some method was not asked."""


def read_answers(results: Sequence[dict[str, Any]], directory: Path) -> dict[str, TaskAnswers]:
    """Read the predictions of all finished cells that have them.

    Args:
        results: The cells; ``predictions`` is a path relative to ``directory``.
        directory: Where the comparison is.

    Returns:
        Tasks, in the order in which they first occur. A file that is not there or cannot be read
        is left out, the latter with a warning.
    """
    cells: dict[str, list[tuple[dict[str, Any], _Lines]]] = {}
    for result in results:
        if result["error"] is None and result.get("predictions"):
            lines = _read_lines(directory / result["predictions"])
            if lines:
                cells.setdefault(result["task"], []).append((result, lines))
    return {task: _align(task, found) for task, found in cells.items()}


def _read_lines(path: Path) -> _Lines:
    lines: _Lines = {}
    seen: Counter[str] = Counter()
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                line = parse_json(text)
                source = str(line["source"]).replace("\\", "/").rpartition("/")[2]
                lines[source, seen[source]] = line
                seen[source] += 1
                _ = line["prediction"], line["correct"]
    except FileNotFoundError:
        return {}  # results that were moved without their cells; the page says what it lacks
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(
            f"the report leaves out the predictions in {path}: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return {}
    return lines


def _align(task: str, cells: Sequence[tuple[dict[str, Any], _Lines]]) -> TaskAnswers:
    """Put the answers of all cells into the order of the first cell's examples."""
    first = cells[0][1]
    keys = [key for key in first if all(key in lines for _, lines in cells)]
    methods = {}
    for method in dict.fromkeys(result["method"] for result, _ in cells):
        own = [(result, lines) for result, lines in cells if result["method"] == method]
        rows = [[lines[key] for key in keys] for _, lines in own]
        methods[method] = MethodAnswers(
            seeds=tuple(result["seed"] for result, _ in own),
            values=tuple(result["value"] for result, _ in own),
            correct=np.array([[bool(line["correct"]) for line in row] for row in rows]),
            predictions=[[line["prediction"] for line in row] for row in rows],
            texts=[[_words(line, "prediction") for line in row] for row in rows],
            losses=_numbers(rows, "loss") * _numbers(rows, "num_tokens"),
            num_tokens=_numbers(rows, "num_tokens"),
        )
    return TaskAnswers(
        task=task,
        metric=cells[0][0]["metric"] or "accuracy",
        examples=[
            Example(
                source=key[0],
                prompt=str(first[key].get("prompt") or ""),
                reference=first[key].get("reference"),
                reference_text=_words(first[key], "reference"),
            )
            for key in keys
        ],
        methods=methods,
        num_left_out=len({key for _, lines in cells for key in lines}) - len(keys),
    )


def _numbers(rows: Sequence[Sequence[dict[str, Any]]], field: str) -> NDArray[np.float64]:
    """(seeds, examples); NaN where there is no number."""
    found = [[line.get(field) for line in row] for row in rows]
    return np.array([[v if isinstance(v, int | float) else np.nan for v in row] for row in found])


def _words(line: dict[str, Any], field: str) -> str:
    value = line.get(f"{field}_text")
    value = line.get(field) if value is None else value
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
