"""``compare --lr-search``: the learning rate of each method is chosen first, on validation rows.

How good a method looks depends on its rate, and best rates differ by method: one default for each
favours those whose default suits the task (Schulman et al., LoRA Without Regret, 2025; Biderman et
al., LoRA Learns Less and Forgets Less, TMLR 2024). So each is tried at as many rates as the others,
at the same multiples of its own. Test rows are not read; what a trial has trained is not trained
again for the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.sources import Sources
from lowmem_reft.data.tasks.metrics import gain
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import (
    MethodSpec,
    with_overrides,
    with_searched_rate,
)
from lowmem_reft.options import CompareOptions, written

FOLDER = "lr-search"
"""In the output directory, for the trials."""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A method with the rate that was chosen, and the trials."""

    spec: MethodSpec
    """As it was given, if it names its rate or every trial failed."""
    trials: list[dict[str, Any]]
    """``lr_search`` of its results: ``method`` (the trial's entry), ``lr``, ``metric``, ``value``,
    ``loss``, ``error``, and whether it is ``chosen``. Of a method that names its rate, that one
    alone."""


def check_search(options: CompareOptions, fixed: Sequence[bool], sources: Sources) -> None:
    """Refuse a search with nothing to choose, or nothing to choose by.

    Raises:
        InputError: There are no validation rows, or every method keeps its rate (``fixed``).
    """
    if sources.validation is None:
        raise InputError(
            f"lr_search must come with validation rows, got {options.matrix.lr_search!r} without "
            "any; add --validation-data, or name --tasks"
        )
    if all(fixed):
        raise InputError(
            f"lr_search must have a method without a rate of its own, got "
            f"{options.matrix.methods!r}; take lr out of an entry"
        )


def search_rates(
    options: CompareOptions,
    specs: Sequence[MethodSpec],
    *,
    fixed: Sequence[bool],
    seed: int,
    sources: Sources,
    run: Callable[[Sequence[Cell]], list[Result]],
) -> list[Searched]:
    """Choose the learning rate of every method: the best on validation rows.

    Of equal values the lower loss is better, then the earlier multiple. A trial that failed, or
    whose metric is no number, is worse than any other.

    Args:
        options: The comparison, with ``lr_search``.
        specs: The methods.
        fixed: Which of them keep their rates.
        seed: Of the trainings.
        sources: What the cells read; their validation rows are scored.
        run: Runs cells and returns their results.
    """
    rates = [
        _rates(spec, options, sources) if is_searched else []
        for spec, is_searched in zip(specs, (not each for each in fixed), strict=True)
    ]
    trials = [
        [with_overrides(spec, {"lr": rate}) for rate in of_spec]
        for spec, of_spec in zip(specs, rates, strict=True)
    ]
    cells = _cells(options, [each for some in trials for each in some], seed, sources)
    results = iter(run(cells))
    found = []
    for spec, of_spec in zip(specs, rates, strict=True):
        tried = [_trial(rate, next(results)) for rate in of_spec]
        best = best_of(tried)
        if best is not None:
            best["chosen"], spec = True, with_searched_rate(spec, best["lr"])
        if not tried:
            tried = [_untried(spec, options, sources)]
        found.append(Searched(spec=spec, trials=tried))
    return found


def best_of(trials: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the best of the trials that have ended, as ``search_rates`` chooses; None of none."""
    return max((each for each in trials if each["error"] is None), key=_rank, default=None)


def _own_rate(spec: MethodSpec, options: CompareOptions, sources: Sources) -> float:
    own = sources.resolved(spec, options)[1].lr
    assert own is not None
    return own


def _rates(spec: MethodSpec, options: CompareOptions, sources: Sources) -> list[float]:
    own = _own_rate(spec, options, sources)
    rates = [float(f"{multiple * own:.3g}") for multiple in options.matrix.lr_multiples]
    if len(set(rates)) < len(rates):
        raise InputError(
            "lr_search must be numbers that differ in their first three digits, got "
            f"{options.matrix.lr_search!r}; write for example 0.3,1,3"
        )
    return rates


def _cells(
    options: CompareOptions, trials: Sequence[MethodSpec], seed: int, sources: Sources
) -> list[Cell]:
    """The cells of trials: the validation rows stand in the place of the test rows."""
    assert sources.validation is not None
    assert sources.validation_digest is not None
    on_validation = replace(
        sources,
        # One search for all tasks that one training serves.
        task=options.scored.train_task or sources.task,
        evaluate=sources.validation,
        evaluate_digest=sources.validation_digest,
        template=sources.train_template,
        scoring=sources.train_scoring,
        examples={},
    )
    own = written.changed(
        options,
        eval_split=options.rows.validation_split,
        eval_limit=options.rows.validation_limit,
        few_shot=None,
    )
    cells = build_cells(own, trials, [seed], on_validation, folder=FOLDER)
    cells = [cell for cell in cells if cell.train is not None]
    for cell in cells:
        cell.record["command"] = None  # that of a comparison would read the test rows
    return cells


def _trial(rate: float, result: Result) -> dict[str, Any]:
    error = result["error"]
    if error is None and result["value"] is None:
        error = f"{result['metric']} is not a number"
    known = {name: result[name] for name in ("method", "metric", "value", "loss")}
    return {**known, "lr": rate, "error": error, "chosen": False}


def _untried(spec: MethodSpec, options: CompareOptions, sources: Sources) -> dict[str, Any]:
    known = {"method": spec.entry, "lr": _own_rate(spec, options, sources), "chosen": True}
    return {**known, **dict.fromkeys(("metric", "value", "loss", "error"))}


def _rank(trial: dict[str, Any]) -> tuple[float, float]:
    loss = math.inf if trial["loss"] is None else trial["loss"]
    return gain(trial["metric"], trial["value"]), -loss
