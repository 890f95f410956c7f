"""What a cell's figures say beside those of other cells: what it forgot, how soon it is as good."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from lowmem_reft.compare.cell import Result
from lowmem_reft.compare.report.names import find_reference
from lowmem_reft.data.tasks.metrics import gain

_TO_REFERENCE = {
    "time_to_reference_s": "train_time_s",
    "steps_to_reference": "num_steps",
    "tokens_to_reference": "num_computed_tokens",
}
"""Field of a result to that of its epochs."""


def relate(results: Sequence[Result]) -> list[Result]:
    """Return the cells with what only all of them together say.

    - ``forgetting``: the cell's ``general_loss`` minus that of the base that is stored the same
      way, on the same task and text; the base's own is 0. It stays where there is no such base.
    - ``reference_value``: the validation score that the reference method reaches on the task, which
      is the low median over its seeds of its best epochs (so at least half of them reach it).
    - ``time_to_reference_s``, ``steps_to_reference`` and ``tokens_to_reference`` (computed ones) of
      the first epoch whose validation score is no worse; None if there is none.
    """
    reference = find_reference(r["method"] for r in results if r.get("num_trainable_params"))
    best: dict[str, list[float]] = {}
    for result in results:
        if result["method"] == reference and (scored := [gained for gained, _ in _epochs(result)]):
            best.setdefault(result["task"], []).append(max(scored))
    bases = {_text_of(result): result["general_loss"] for result in results if _is_base(result)}
    found = []
    for result in results:
        own = best.get(result["task"])
        target = statistics.median_low(own) if own else None
        before, after = bases.get(_text_of(result)), result.get("general_loss")
        if before is not None and after is not None:
            result = {**result, "forgetting": after - before}
        found.append({**result, **_reached(result, target)})
    return found


def _is_base(result: Result) -> bool:
    return result.get("num_trainable_params") == 0 and result.get("general_loss") is not None


def _text_of(result: Result) -> tuple[Any, ...]:
    config = result.get("config") or {}
    same = json.dumps([config.get("model"), config.get("forgetting")], sort_keys=True)
    return result["task"], result.get("storage"), same


def _epochs(result: Result) -> list[tuple[float, dict[str, Any]]]:
    """The gain of each epoch that has a value, with its line, if it says what was spent."""
    return [
        (gain(line.get("metric"), line["value"]), line)
        for line in result.get("validation") or ()
        if line.get("train_time_s") is not None and line["value"] is not None
    ]


def _reached(result: Result, target: float | None) -> dict[str, float | None]:
    epochs = _epochs(result)
    first: dict[str, Any] = {}
    if target is not None:
        first = next((line for gained, line in epochs if gained >= target), {})
    metric = epochs[0][1].get("metric") if epochs else None
    return {
        # The gain of a gain is the value.
        "reference_value": None if target is None or not epochs else gain(metric, target),
        **{name: first.get(of) for name, of in _TO_REFERENCE.items()},
    }
