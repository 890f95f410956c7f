"""The comparison: every method with every seed, trained and scored, memory beside accuracy.

``run_comparison`` turns the options into cells (``cells.py``), runs each in its own process
(``queue.py``) and writes ``results.json``, ``results.csv`` and the report (``report/``). This
module loads no model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lowmem_reft.compare import report
from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.engines.launch import CHILD_COMMAND
from lowmem_reft.compare.outputs import check_comparison
from lowmem_reft.compare.queue import run_cells
from lowmem_reft.compare.report.console import Progress, print_table
from lowmem_reft.compare.report.relative import relate
from lowmem_reft.compare.report.table import aggregate
from lowmem_reft.compare.sources import Sources, find_all_sources
from lowmem_reft.errors import InputError, naming
from lowmem_reft.machine.locks import alone
from lowmem_reft.methods.entries import MethodSpec, expand_methods, parse_methods
from lowmem_reft.options import CompareOptions, written

DEFAULT_METHODS = "loreft,loreft[storage=bf16],lora,qlora"
EMBEDDED_METHODS = (
    "loreft[rank=8,lr=4e-3],loreft[rank=8,lr=4e-3,storage=bf16],lora[rank=8,lr=2e-3],"
    "qlora[rank=8,lr=2e-3]"
)


def run_comparison(
    options: CompareOptions, *, child_command: Sequence[str] = CHILD_COMMAND
) -> dict[str, Any]:
    """Run the matrix task x method x seed, the untuned base first, and write the report.

    Args:
        options: What to compare; finished cells in ``options.output_dir`` are not run again.
        child_command: Replaces the process that runs a cell.

    Returns:
        ``output_dir``, ``results``, ``csv``, ``report`` (paths), ``num_cells``, ``num_failed`` and
        ``rows``: the table's rows, each a method with means over its seeds.

    Raises:
        InputError: The methods, seeds, model or data are wrong.
    """
    check_comparison(options)
    every = options.matrix.methods == "all"
    chosen, embedded = options.matrix, options.is_embedded
    given = default_methods(options) if chosen.methods is None else chosen.methods
    methods = expand_methods(given, embedded=embedded)
    with naming("budget_reference"):
        reference = chosen.budget_reference and expand_methods(
            chosen.budget_reference, embedded=embedded
        )
    options = written.changed(options, methods=methods, budget_reference=reference)
    specs, seeds = parse_methods(methods), parse_seeds(options.matrix.seeds)
    every_source = [*find_all_sources(options)]
    with alone(options.output_dir, options.output_dir / ".lock"):
        cells = [
            cell
            for sources in every_source
            for cell in _cells_of_task(options, specs, seeds, sources, child_command)
        ]
        with Progress(len(cells), quiet=options.quiet) as progress:
            results = run_cells(
                cells, observer=progress, workers=options.workers, child_command=child_command
            )
        results = relate(results)
        files = report.write_results(results, options.output_dir)
    rows = aggregate(results)
    if not options.quiet:
        print_table(rows)
    return {
        **files,
        "num_cells": len(results),
        "num_failed": sum(
            # Of all methods, some are refused for a reason that their rows state.
            result["error"] is not None and not (every and is_refused(result))
            for result in results
        ),
        "rows": [asdict(row) for row in rows],
    }


def _cells_of_task(
    options: CompareOptions,
    specs: Sequence[MethodSpec],
    seeds: Sequence[int],
    sources: Sources,
    child_command: Sequence[str],
) -> list[Cell]:
    """The cells of one task, with equal budgets if they are asked for."""
    if options.matrix.equal is None:
        return build_cells(options, specs, seeds, sources)
    from lowmem_reft.compare.budget import equalize  # torch, which nothing else here needs

    def cells_of(chosen: CompareOptions, own: Sequence[MethodSpec]) -> list[Cell]:
        return build_cells(chosen, own, seeds[:1], sources)

    def run(timed: Sequence[Cell]) -> list[Result]:
        with Progress(len(timed), quiet=options.quiet) as progress:
            return run_cells(timed, observer=progress, child_command=child_command)

    equal = equalize(options, specs, cells_of=cells_of, run=run)
    if not options.quiet:
        for label, note in equal.notes.items():
            print(f"{label}: {note}", file=sys.stderr)
    cells = build_cells(equal.options, equal.specs, seeds, sources)
    for cell in cells:
        cell.record["budget"] = equal.notes.get(cell.record["method"])
    return cells


def is_refused(result: Result) -> bool:
    """Whether a cell's method was refused as bad input, and did not fail."""
    return str(result["error"]).startswith(f"{InputError.__name__}:")


def default_methods(options: CompareOptions) -> str:
    """The methods when none are named; the tiny model wants higher learning rates."""
    return EMBEDDED_METHODS if options.is_embedded else DEFAULT_METHODS


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers.

    Raises:
        InputError: Something is no number, or is there twice, or there is nothing.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise InputError(
            f"seeds must be different non-negative integers, got {text!r}; write for example 0,1,2"
        )
    return [int(word) for word in words]
