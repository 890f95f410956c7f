"""Keeps the results of comparisons as one file for ``benchmarks/results``.

``python -m benchmarks.collect OUT_DIR... --output benchmarks/results/NAME.json`` joins the
``results.json`` of output directories of ``lowmem-reft compare``: cells in their order, the last
one of equal ones, loss histories thinned to 50 points. Failed cells stay, with their errors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowmem_reft.compare.report.joining import join

POINTS = 50
"""Most points of a loss history."""


@dataclass(frozen=True, kw_only=True)
class Collect:
    """What to join."""

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Output directories of comparisons."""
    output: Path
    """Where the file goes."""


def collect(directories: tuple[Path, ...]) -> list[dict[str, Any]]:
    """Return the cells of all directories, each once."""
    return [thinned(cell) for cell in join(directories, relative_to=Path())]


def thinned(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell without what only its own directory has, its loss history shortened."""
    history = cell.get("loss_history") or []
    step = -(-len(history) // POINTS) or 1
    return {**cell, "loss_history": history[::step], "predictions": None}


def main(options: Collect) -> int:
    """Write the file; say how many cells there are and which failed."""
    cells = collect(options.directories)
    options.output.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    failed = [f"{cell['task']} {cell['method']}" for cell in cells if cell["error"]]
    print(f"{len(cells)} cells, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Collect, description=__doc__)))
