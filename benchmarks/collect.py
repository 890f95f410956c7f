"""Keeps the results of comparisons as one file for ``benchmarks/results``.

``python -m benchmarks.collect OUT_DIR... --output benchmarks/results/NAME.json`` joins the
``results.json`` of output directories of ``lowmem-reft compare``: cells in their order, the last
one of equal ones, loss histories thinned to 50 points. Failed cells stay, with their errors. With
``--reference METHOD`` each cell also says how far its method is from that one on its task, by the
paired bootstrap over the answers, which are not kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lowmem_reft.compare.report.answers import read_answers
from lowmem_reft.compare.report.joining import join
from lowmem_reft.compare.report.relative import relate
from lowmem_reft.compare.report.significance import compare_with

POINTS = 50
"""Most points of a loss history."""


@dataclass(frozen=True, kw_only=True)
class Collect:
    """What to join."""

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Output directories of comparisons."""
    output: Path
    """Where the file goes."""
    reference: str | None = None
    """The method, as it is called in the results, that the others are compared with."""


def collect(directories: tuple[Path, ...]) -> list[dict[str, Any]]:
    """Return the cells of all directories, each once, with what they say beside each other."""
    return relate(join(directories, relative_to=Path()))


def compared(cells: list[dict[str, Any]], reference: str) -> list[dict[str, Any]]:
    """Add to each cell the ``difference`` of its method from the reference: None where unknown.

    Values, bounds of the 95 % interval and ``p_holm`` are those of ``significance.Difference``;
    Holm's correction is over the methods of a task.
    """
    found = {}
    for task, answers in read_answers(cells, Path()).items():
        others = [name for name in answers.methods if name != reference]
        significance = compare_with(answers, reference, others)
        for method, difference in (significance.differences if significance else {}).items():
            found[task, method] = {"reference": reference, **asdict(difference)}
    return [{**cell, "difference": found.get((cell["task"], cell["method"]))} for cell in cells]


def thinned(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a cell without what only its own directory has, its loss history shortened."""
    history = cell.get("loss_history") or []
    step = -(-len(history) // POINTS) or 1
    return {**cell, "loss_history": history[::step], "predictions": None}


def main(options: Collect) -> int:
    """Write the file; say how many cells there are and which failed."""
    cells = collect(options.directories)
    if options.reference is not None:
        cells = compared(cells, options.reference)
    cells = [thinned(cell) for cell in cells]
    options.output.write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    failed = [f"{cell['task']} {cell['method']}" for cell in cells if cell["error"]]
    print(f"{len(cells)} cells, {len(failed)} failed: {', '.join(failed) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Collect, description=__doc__)))
