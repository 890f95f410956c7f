"""The comparison: every method with every seed, trained and scored, memory beside accuracy.

``run_comparison`` turns the options into cells (``cells.py``), runs each in its own process
(``queue.py``) and writes ``results.json``, ``results.csv`` and the report (``report/``). This
module loads no model.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lowmem_reft.compare import report
from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.earlier import find_earlier
from lowmem_reft.compare.engines.launch import CHILD_COMMAND
from lowmem_reft.compare.lr_search import check_search, search_rates
from lowmem_reft.compare.outputs import check_comparison
from lowmem_reft.compare.queue import run_cells
from lowmem_reft.compare.report.console import Progress, print_table, print_verdicts
from lowmem_reft.compare.report.rates import in_words
from lowmem_reft.compare.report.relative import relate
from lowmem_reft.compare.report.table import aggregate
from lowmem_reft.compare.sources import Sources, find_all_sources, with_embedded_rows
from lowmem_reft.errors import InputError, naming
from lowmem_reft.machine.locks import alone
from lowmem_reft.machine.run_files import write_run_file
from lowmem_reft.machine.terminal import for_stream
from lowmem_reft.methods.entries import MethodSpec, expand_methods, parse_methods
from lowmem_reft.options import CompareOptions, Workers, written
from lowmem_reft.options.values import parse_seeds

DEFAULT_METHODS = "loreft,loreft[storage=bf16],lora,qlora"
EMBEDDED_METHODS = (
    "loreft[rank=8,lr=4e-3],loreft[rank=8,lr=4e-3,storage=bf16],lora[rank=8,lr=2e-3],"
    "qlora[rank=8,lr=2e-3]"
)


_SAID_ANEW = ("task", "command", "budget", "lr_search")
"""Fields of a result that are this run's, also where the cell has finished in another."""


def run_comparison(
    options: CompareOptions, *, child_command: Sequence[str] = CHILD_COMMAND
) -> dict[str, Any]:
    """Run the matrix task x method x seed, the untuned base first, and write the report.

    Args:
        options: What to compare; finished cells in ``options.output_dir`` are not run again, and
            those of other methods and seeds stay in the report where these options give the same.
        child_command: Replaces the process that runs a cell.

    Returns:
        ``output_dir``, ``results``, ``csv``, ``report`` (paths), ``verdict`` (which method to take,
        by task), ``num_cells``, ``num_failed`` and ``rows``: a row for each method of this run,
        with means over its seeds. The files and the table have what earlier runs left, too. With
        ``dry_run`` what ``dry_run.dry_run`` says instead.

    Raises:
        InputError: The methods, seeds, model or data are wrong.
    """
    check_comparison(options)
    parse_seeds(options.matrix.seeds)  # before anything is read
    every = options.matrix.methods == "all"
    chosen, embedded = options.matrix, options.is_embedded
    given = default_methods(options) if chosen.methods is None else chosen.methods
    methods = expand_methods(given, embedded=embedded)
    with naming("budget_reference"):
        reference = chosen.budget_reference and expand_methods(
            chosen.budget_reference, embedded=embedded
        )
    options = written.changed(options, methods=methods, budget_reference=reference)
    specs = parse_methods(methods, with_equal=True)
    # What suits the tiny model is no choice of the user's.
    as_given = parse_methods(expand_methods(given, embedded=False), with_equal=True)
    fixed = [chosen.methods is not None and "lr" in spec.optim_overrides for spec in as_given]
    if chosen.lr_search is not None:
        options = with_embedded_rows(options)
    runner = _Runner(options, child_command)
    if chosen.dry_run:
        from lowmem_reft.compare import dry_run  # torch, which nothing else here needs

        dry_run.check_dry_run(options)
        with tempfile.TemporaryDirectory() as rows:
            elsewhere = find_all_sources(replace(options, output_dir=Path(rows)))
            made = [_cells_of_task(options, specs, fixed, each, runner) for each in elsewhere]
            cells = [cell for of_task, _ in made for cell in of_task]
            return dry_run.dry_run(cells, quiet=options.quiet or options.json)
    every_source = [*find_all_sources(options)]
    for sources in every_source:
        if sources.also_trained and not options.quiet:
            print(f"eval_data of {sources.task}: {sources.also_trained}", file=sys.stderr)
    with alone(options.output_dir, options.output_dir / ".lock"):
        write_run_file(options.output_dir, "compare", options)
        cells = []
        planned = []
        for sources in every_source:
            of_task, chosen_options = _cells_of_task(options, specs, fixed, sources, runner)
            cells += of_task
            planned.append((chosen_options, sources))
        results = [
            {**result, **{name: cell.record[name] for name in _SAID_ANEW if name in cell.record}}
            for cell, result in zip(cells, runner.run(cells, options.workers), strict=True)
        ]
        earlier = find_earlier(options.output_dir, {cell.directory for cell in cells}, planned)
        every_result = relate([*results, *earlier.kept])
        files = report.write_results(every_result, options.output_dir)
    if not options.quiet:
        for note in earlier.notes():
            print(f"lowmem-reft compare: {for_stream(note, sys.stderr)}", file=sys.stderr)
        print_table(aggregate(every_result))
        print_verdicts(files["verdict"])
    results = every_result[: len(cells)]
    return {
        **files,
        "num_cells": len(results),
        "num_failed": sum(
            # Of all methods, some are refused for a reason that their rows state.
            result["error"] is not None and not (every and is_refused(result))
            for result in results
        ),
        "rows": [asdict(row) for row in aggregate(results)],
    }


class _Runner:
    """Runs cells with a bar."""

    def __init__(self, options: CompareOptions, child_command: Sequence[str]) -> None:
        self._options, self._command = options, child_command
        self._trials: dict[Path, Result] = {}

    def run(self, cells: Sequence[Cell], workers: Workers = 1) -> list[Result]:
        with Progress(len(cells), quiet=self._options.quiet) as progress:
            return run_cells(cells, observer=progress, workers=workers, child_command=self._command)

    def try_out(self, cells: Sequence[Cell]) -> list[Result]:
        """Run trials, each once for all tasks: one that failed is not tried again for the next."""
        new = [cell for cell in cells if cell.directory not in self._trials]
        results = self.run(new, self._options.workers) if new else []
        self._trials |= {cell.directory: result for cell, result in zip(new, results, strict=True)}
        return [self._trials[cell.directory] for cell in cells]

    def say(self, label: str, words: str) -> None:
        if not self._options.quiet:
            print(f"{label}: {words}", file=sys.stderr)


def _cells_of_task(
    options: CompareOptions,
    specs: Sequence[MethodSpec],
    fixed: Sequence[bool],
    sources: Sources,
    runner: _Runner,
) -> tuple[list[Cell], CompareOptions]:
    """The cells of one task, with equal budgets and searched rates if they are asked for.

    And the options that they are built from: an equal budget changes them.
    """
    seeds = parse_seeds(options.matrix.seeds)
    reasons: list[dict[str, Any]] = [{} for _ in specs]
    if options.matrix.lr_search is not None:
        check_search(options, fixed, sources)
    if options.matrix.equal is not None or any(spec.equal for spec in specs):
        from lowmem_reft.compare.budget import equalize  # torch, which nothing else here needs

        def cells_of(chosen: CompareOptions, own: Sequence[MethodSpec]) -> list[Cell]:
            return build_cells(chosen, own, seeds[:1], sources)

        equal = equalize(options, specs, cells_of=cells_of, run=runner.run)
        options, specs = equal.options, equal.specs
        for spec, reason in zip(specs, reasons, strict=True):
            reason["budget"] = equal.notes.get(spec.label)
        for label, note in equal.notes.items():
            runner.say(label, note)
    if options.matrix.lr_search is not None:
        found = search_rates(
            options, specs, fixed=fixed, seed=seeds[0], sources=sources, run=runner.try_out
        )
        specs = [each.spec for each in found]
        for each, reason in zip(found, reasons, strict=True):
            reason["lr_search"] = each.trials
            runner.say(each.spec.entry, f"learning rate: {in_words(each.trials)}")
    of_method = {spec.label: reason for spec, reason in zip(specs, reasons, strict=True)}
    cells = build_cells(options, specs, seeds, sources)
    for cell in cells:
        cell.record.update(of_method.get(cell.record["method"], {}))
    return cells, options


def is_refused(result: Result) -> bool:
    """Whether a cell's method was refused as bad input, and did not fail."""
    return str(result["error"]).startswith(f"{InputError.__name__}:")


def default_methods(options: CompareOptions) -> str:
    """The methods when none are named; the tiny model wants higher learning rates."""
    return EMBEDDED_METHODS if options.is_embedded else DEFAULT_METHODS
