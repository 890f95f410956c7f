"""Cells that earlier runs left in the output directory: those that agree stay in the report.

A later run with other methods or seeds shows them too, where the options of now would give the
same cell: the key of a cell (``cells.py``) says so, as it holds model, rows, metric and settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowmem_reft.compare.cell import Result, cell_files
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.engines.launch import stored_result
from lowmem_reft.compare.sources import Sources
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.options import CompareOptions

_MOST_NAMES = 8
_BASE = re.compile(r"base\[(?:shots=\d+,)?storage=(?P<storage>\w+)\]")


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What was found beside the cells of this run."""

    kept: list[Result] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    """Names of cells by the reason why they are not of this comparison."""

    def notes(self) -> list[str]:
        """What is to be said of them."""
        kept = [_name(result) for result in self.kept]
        said = [f"kept from earlier runs: {_listed(kept)}"] if kept else []
        return said + [
            f"left out of the report, as an earlier run had {why}: {_listed(names)}"
            for why, names in self.left_out.items()
        ]


def find_earlier(
    directory: Path,
    current: Collection[Path],
    planned: Sequence[tuple[CompareOptions, Sources]],
) -> Earlier:
    """Find the finished cells of earlier runs that belong to this comparison.

    Args:
        directory: The output directory.
        current: Directories of the cells of this run.
        planned: The options and sources of each task, as this run's cells were built from them.
    """
    found = Earlier()
    of_task = {sources.task: (options, sources) for options, sources in planned}
    for path in cell_files(directory):
        result = stored_result(path.with_name("result.json"))
        if path.parent in current or result is None or result["error"] is not None:
            continue  # what has not finished is no row
        same = of_task.get(result["task"])
        why = "another task" if same is None else _difference(result, *same)
        if why is None:
            found.kept.append(result)
        else:
            found.left_out.setdefault(why, []).append(_name(result))
    return found


def _difference(result: Result, options: CompareOptions, sources: Sources) -> str | None:
    """What of a cell is not as the options have it; None if it would be the same cell."""
    expected = _config(result, options, sources)
    config = result["config"] or {}
    if expected is None:
        return "a method that is not known"
    names = [name for name in {**expected, **config} if not _same(expected, config, name)]
    return f"another {' and '.join(names)}" if names else None


def _same(one: dict[str, Any], other: dict[str, Any], name: str) -> bool:
    # As text: one of them was read from JSON.
    first, second = (json.dumps(each.get(name), sort_keys=True) for each in (one, other))
    return first == second


def _config(result: Result, options: CompareOptions, sources: Sources) -> dict[str, Any] | None:
    """The config that a cell of this name would have; None if the name tells no method."""
    label, config = result["method"], result["config"] or {}
    base = _BASE.fullmatch(label)
    # Of a rate that was searched, the one that was found.
    rate = (config.get("optim") or {}).get("lr")
    entry = label.replace("lr=searched", f"lr={rate}")
    if base:
        entry = f"loreft[storage={base['storage']}]"  # any method whose base is stored so
    try:
        specs = parse_methods(entry)
        cells = build_cells(options, specs, [result["seed"]], sources)
    except InputError:
        return None
    expected: dict[str, Any] = cells[0 if base else -1].record["config"]
    if base and "examples" in (prompts := config.get("prompts") or {}):
        own = {**expected.get("prompts", {}), "examples": prompts["examples"]}
        expected = {**expected, "prompts": own}
    return expected


def _name(result: Result) -> str:
    return f"{result['method']} seed {result['seed']}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
