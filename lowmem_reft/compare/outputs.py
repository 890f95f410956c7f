"""What comparisons, reports and searches write, and whether it may be written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lowmem_reft.data.rows import Row, as_records, write_rows
from lowmem_reft.errors import InputError
from lowmem_reft.machine.destinations import check_directory, check_not_read, read_or_none
from lowmem_reft.machine.run_files import NAME, check_run_file
from lowmem_reft.options import CompareOptions, SweepOptions

_REPORT = (
    *("results.json", "results.csv", "report.html"),
    *("accuracy_vs_*.png", "validation_vs_*.png", "memory_breakdown.png", "loss_curves*.png"),
    *("layers_x_positions*.png", "learning_rates*.png"),
)
_ROWS = ("data/", "rows/", "cells/", "reuse/", "trained/", "lr-search/")


def check_comparison(options: CompareOptions | SweepOptions) -> None:
    """Refuse an output directory in which something would be lost, or that cannot be written.

    Raises:
        InputError: It is one.
    """
    check_directory(
        "output_dir",
        options.output_dir,
        written=("sweep.json",) if isinstance(options, SweepOptions) else _REPORT,
        shared=_ROWS,
        sources={"model": options.base.model, **_read(options)},
        # Whoever goes on from a sweep.json says himself what is wrong with it.
        is_ours=None if isinstance(options, SweepOptions) else _holds_results,
    )
    check_run_file(options.output_dir)
    if options.reuse.reuse_dir is not None:
        check_directory("reuse_dir", options.reuse.reuse_dir)


def check_report(directory: Path) -> None:
    """Refuse a directory in which a report would replace something else, or cannot be written.

    Raises:
        InputError: It is one.
    """
    check_directory("output_dir", directory, written=_REPORT, is_ours=_holds_results)


def keep_rows(options: CompareOptions | SweepOptions, name: str, rows: Sequence[Row]) -> Path:
    """Write rows for every cell to read, below the output directory, and return the file.

    Raises:
        InputError: A file that is read is there, or another one, in a directory of others.
    """
    directory = options.output_dir
    path = directory / name
    check_not_read("output_dir", path, _read(options))
    if path.is_file() and _holds_others(directory):
        lines = path.read_bytes().decode(errors="replace").split("\n")
        ours = [json.dumps(record, ensure_ascii=False) for record in as_records(rows)]
        if lines != [*ours, ""]:
            raise InputError(
                f"output_dir must be new, or of an earlier run of this command, got "
                f"{str(directory)!r} with another {name}; choose another, or move that away"
            )
    return write_rows(path, rows)


def _holds_others(directory: Path) -> bool:
    """Whether there is no cell and something that is never ours."""
    ours = {each.rstrip("/") for each in (*_REPORT, *_ROWS, "sweep.json", ".lock", "timing/", NAME)}
    names = {path.name for path in directory.iterdir()}
    return "cells" not in names and bool(names - ours)


def _read(options: CompareOptions | SweepOptions) -> dict[str, str | None]:
    names = ("data", "validation_data", "eval_data")
    read: dict[str, str | None] = {name: getattr(options.rows, name) for name in names}
    if isinstance(options, CompareOptions):
        read["forgetting"] = options.scored.forgetting.forgetting
    return read


def _holds_results(directory: Path) -> bool:
    cells = read_or_none(directory / "results.json")
    return isinstance(cells, list) and all(
        isinstance(cell, dict) and {"method", "task", "seed"} <= cell.keys() for cell in cells
    )
