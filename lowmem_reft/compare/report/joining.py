"""Finished comparisons as one: ``lowmem-reft report``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowmem_reft.compare.cell import EMPTY_RESULT, cell_files, what_is_wrong
from lowmem_reft.compare.engines.launch import stored_result
from lowmem_reft.compare.outputs import check_report
from lowmem_reft.compare.report import write_results
from lowmem_reft.compare.report.console import print_table, print_verdicts
from lowmem_reft.compare.report.relative import relate
from lowmem_reft.compare.report.table import aggregate
from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json
from lowmem_reft.options import ReportOptions

_NEEDED = ("method", "task", "seed")


def run_report(options: ReportOptions) -> dict[str, Any]:
    """Join comparisons and write their table, plots and page.

    Args:
        options: Which, and where to.

    Returns:
        ``output_dir``, ``results``, ``csv``, ``report`` (paths), ``verdict`` (which method to take,
        by task), ``num_cells`` and ``rows``: the table's rows, each a method with means over its
        seeds.

    Raises:
        InputError: A source holds no results.
    """
    check_report(options.output_dir)
    results = relate(join(options.sources, relative_to=options.output_dir))
    written = write_results(results, options.output_dir, texts=not options.hide_texts)
    rows = aggregate(results)
    if not options.quiet:
        print_table(rows)
        print_verdicts(written["verdict"])
    return {**written, "num_cells": len(results), "rows": [asdict(row) for row in rows]}


def join(sources: Sequence[Path], *, relative_to: Path) -> list[dict[str, Any]]:
    """Return the cells of all sources in their order, each once, the last of equal ones.

    A directory without ``results.json`` gives the cells that have ended, and is named as
    unfinished. A task that two sources scored on different rows, over different bases or by
    different metrics is named on standard error: its methods are not comparable.

    Args:
        sources: Output directories of comparisons, or files with their results.
        relative_to: What ``predictions`` of the cells are to be relative to.

    Raises:
        InputError: A source holds no results.
    """
    cells: dict[tuple[str, str, int], dict[str, Any]] = {}
    scored: dict[str, dict[str, Path]] = {}
    for source in sources:
        path = source / "results.json" if source.is_dir() else source
        for cell in _unfinished(source) or _read(path, source):
            predictions = cell.get("predictions")
            if predictions:
                predictions = os.path.relpath(path.parent / predictions, relative_to)
            joined = {**EMPTY_RESULT, **cell, "predictions": predictions, "verdict": None}
            cells[cell["task"], cell["method"], cell["seed"]] = joined
            config = cell.get("config") or {}
            base = (config.get("model") or {}).get("model")
            how = [config.get("eval_data"), base, None if cell.get("error") else cell.get("metric")]
            if how[-1] is not None:
                scored.setdefault(cell["task"], {}).setdefault(json.dumps(how), source)
    for task, found in scored.items():
        if len(found) > 1:
            places = " and ".join(dict.fromkeys(str(source) for source in found.values()))
            print(
                f"lowmem-reft report: {task} was scored on different rows, or with different "
                f"prompts, bases or metrics, in {places}; do not compare its methods across them",
                file=sys.stderr,
            )
    return list(cells.values())


def _unfinished(source: Path) -> list[dict[str, Any]]:
    """The cells of a comparison that has not ended, or was killed; none if that is no such one.

    How many there are is said on standard error; those that were not begun are not known here.
    """
    if not source.is_dir() or (source / "results.json").is_file():
        return []
    begun = cell_files(source)
    found = [stored_result(path.with_name("result.json")) for path in begun]
    results = [result for result in found if result is not None]
    if begun:
        failed = sum(result["error"] is not None for result in results)
        print(
            f"lowmem-reft report: the comparison in {source} has not ended: "
            f"{len(results) - failed} cells have finished, {failed} failed and "
            f"{len(begun) - len(results)} were begun and have no result; those that are to come "
            "are missing too. The same compare command runs the rest",
            file=sys.stderr,
        )
    return results


def _read(path: Path, source: Path) -> list[dict[str, Any]]:
    try:
        cells = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"sources must be output directories of lowmem-reft compare, got {str(source)!r} "
            f"({path.name}: {error.strerror}); give one in which a comparison has ended"
        ) from error
    except ValueError as error:
        raise InputError(
            f"sources must hold results of lowmem-reft compare, got {str(path)!r} ({error}); "
            "run the comparison again, which keeps its finished cells"
        ) from error
    if not (
        isinstance(cells, list)
        and cells
        and all(isinstance(cell, dict) and cell.keys() >= {*_NEEDED} for cell in cells)
    ):
        raise InputError(
            f"sources must hold a list of cells with {', '.join(_NEEDED)}, got {str(path)!r}; "
            "give results.json of lowmem-reft compare"
        )
    for number, cell in enumerate(cells, start=1):
        if (wrong := what_is_wrong(cell)) is not None:
            raise InputError(
                f"{path}, cell {number}: {wrong}; run the comparison again, which keeps its "
                "finished cells"
            )
    return cells
