"""What a comparison would run, and what each method would need: ``compare --dry-run``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lowmem_reft.base.stored import in_one_line
from lowmem_reft.compare.cell import Cell
from lowmem_reft.compare.queue import finished_result
from lowmem_reft.errors import InputError
from lowmem_reft.machine.terminal import harmless
from lowmem_reft.memory.verdict import gib
from lowmem_reft.runs.before import settings_of
from lowmem_reft.runs.fitting import changed_flags, fit_into_memory, predicted
from lowmem_reft.runs.resolve import resolve

if TYPE_CHECKING:
    from lowmem_reft.options import CompareOptions, TrainOptions
    from lowmem_reft.runs.resolve import Run

_SHOWN = ("rank", "layers", "positions", "lr", "epochs")
_SETTINGS = ("storage", *_SHOWN, "batch_size")


def check_dry_run(options: CompareOptions) -> None:
    """Refuse what is found by running something.

    Raises:
        InputError: Rates are searched, or steps are timed.
    """
    for name, value in (("lr_search", options.matrix.lr_search), ("equal", options.matrix.equal)):
        if value is not None and value not in ("params", "memory"):
            raise InputError(
                f"{name} must be left out with dry_run, got {value!r}: its trials decide what the "
                "cells are; leave it out to see the others"
            )


def dry_run(cells: Sequence[Cell], *, quiet: bool) -> dict[str, Any]:
    """Tell finished cells from those to run, and predict each method's training once.

    Returns:
        ``num_cells``, ``num_finished``, ``cells`` (``task``, ``method``, ``seed``, ``directory``,
        ``finished``) and ``methods``: with ``task`` and ``method``, the settings as they were
        resolved and fitted into the memory there is, ``fitted`` (the flags that this changes),
        ``peak_bytes`` of a training step (None where it cannot be predicted) and
        ``error``, for which the method would be refused.
    """
    found: list[dict[str, Any]] = []
    methods: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        task, method = cell.record["task"], cell.record["method"]
        found.append(
            {
                "task": task,
                "method": method,
                "seed": cell.record["seed"],
                "directory": str(cell.directory),
                "finished": finished_result(cell) is not None,
            }
        )
        if cell.train is not None and (task, method) not in methods:
            methods[task, method] = {"task": task, "method": method, **_resolved(cell.train)}
    result = {
        "num_cells": len(found),
        "num_finished": sum(cell["finished"] for cell in found),
        "cells": found,
        "methods": list(methods.values()),
    }
    if not quiet:
        _print(result)
    return result


def _resolved(train: TrainOptions) -> dict[str, Any]:
    nothing: dict[str, Any] = dict.fromkeys((*_SETTINGS, "fitted", "peak_bytes", "error"))
    try:
        run = resolve(train)
        run, fitted = _fitted(run)
    except InputError as error:
        return {**nothing, "error": str(error)}
    except Exception as error:  # with a budget, of a kind of model that cannot be predicted
        return {**nothing, "error": in_one_line(error)}
    known = {**vars(run.optim), **run.as_resolved, **settings_of(run), "epochs": run.num_epochs}
    nothing |= {name: known.get(name) for name in _SETTINGS} | {"fitted": fitted}
    try:
        return {**nothing, "peak_bytes": predicted(run)["peak_bytes"]}
    except Exception as error:  # of a kind of model that cannot be predicted, but may be trained
        # A method that does not go with the base is refused when it runs, too.
        return {**nothing, "error": in_one_line(error)}


def _fitted(run: Run) -> tuple[Run, str]:
    """Return a run as it would fit into its memory, and the flags that this changes.

    Raises:
        InputError: Nothing fits.
    """
    given = replace(run.options, run=replace(run.options.run, quiet=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it cannot be predicted is the method's error
        fitted = fit_into_memory(replace(run, options=given))
    # Whether there is room for dequantized blocks is not what makes it fit.
    return fitted, changed_flags(given, replace(fitted.options, reuse=given.reuse))


def _print(result: dict[str, Any]) -> None:
    """Print a line for each method, and for the base of each storage."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in result["cells"]:
        lines.setdefault((cell["task"], cell["method"]), []).append(cell)
    settings = {(each["task"], each["method"]): each for each in result["methods"]}
    more = ("to fit",) if any(each["fitted"] for each in result["methods"]) else ()
    titles = ("task", "method", "seeds to run", "finished", *_SHOWN, *more)
    table = Table(*titles, "peak of a step", box=None, pad_edge=False)
    for place, cells in lines.items():
        known = settings.get(place, {})
        seeds = [
            ", ".join(str(cell["seed"]) for cell in cells if cell["finished"] is finished)
            for finished in (False, True)
        ]
        values = [_shown(known.get(name)) for name in _SHOWN]
        values += [known.get("fitted") or "" for _ in more]
        peak = known.get("peak_bytes")
        last = known.get("error") or ("" if peak is None else gib(peak))
        table.add_row(*map(harmless, (*place, *seeds, *values, last)))
    # As wide as it is: what a terminal wraps can be copied, a name that is cut cannot.
    Console(width=1000, highlight=False, markup=False).print(table)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else f"{value}"
