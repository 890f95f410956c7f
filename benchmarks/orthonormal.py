"""How fast the orthonormal map is, forward and backward, beside pyreft's.

Run ``python -m benchmarks.orthonormal``. Goal: at most a tenth of pyreft's time at hidden 4096 x
rank 8. Both sides compute the map once; in training pyreft computes it twice per forward pass and
we once per optimizer step, which is not counted here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import Worker, alternate, environment, pyreft_python, ratio, report

GOAL = 0.1
SHAPES = ((4096, 8), (8192, 8), (4096, 64))
SMALL_SHAPES = ((256, 4),)
COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "median ms": lambda row: f"{row['median_s'] * 1e3:.3f}",
    "min ms": lambda row: f"{row['min_s'] * 1e3:.3f}",
    "max ms": lambda row: f"{row['max_s'] * 1e3:.3f}",
    "max |QQ' - I|": lambda row: f"{row['orthonormality_error']:.1e}",
    "kept MiB": lambda row: f"{row['state_bytes'] / 2**20:.2f}",
}


@dataclass(frozen=True, kw_only=True)
class OrthonormalOptions:
    """Time the orthonormal map beside pyreft's."""

    pyreft_python: str | None = None
    """Interpreter of an environment with pyreft (default: $LOWMEM_REFT_PYREFT_PYTHON). Without
    one, torch's parametrization is measured as pyreft configures it."""
    threads: int = 2
    """Threads of every process."""
    repeats: int = 3
    """Timed rounds; each process has warmed up before the first."""
    small: bool = False
    """A tiny shape that only shows that the benchmark works."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/*.json)."""


def run(options: OrthonormalOptions) -> dict[str, Any]:
    """Measure every shape with both maps and return the result."""
    peer_python = pyreft_python(options.pyreft_python)
    record = environment(peer_python=peer_python)
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any] | None] = []
    for hidden, rank in SMALL_SHAPES if options.small else SHAPES:
        shape = f"{hidden}x{rank}"
        ours, theirs = f"ours {shape}", f"{'pyreft' if peer_python else 'torch, as pyreft'} {shape}"
        spec = {"kind": "orthonormal", "hidden": hidden, "rank": rank}
        workers = [
            Worker(
                label=ours,
                module="benchmarks.worker",
                spec=spec | {"method": "ours"},
                threads=options.threads,
            ),
            Worker(
                label=theirs,
                module="benchmarks.pyreft_worker" if peer_python else "benchmarks.worker",
                spec=spec | {"method": "torch"},
                python=peer_python or sys.executable,
                threads=options.threads,
            ),
        ]
        rows += alternate(workers, num_warmup=0, num_repeats=options.repeats)
        ratios.append(ratio(rows, ours, theirs, GOAL))
    return {"benchmark": "orthonormal", "rows": rows, "ratios": ratios, "environment": record}


def main() -> None:
    """Run the benchmark from the command line; the exit code is 1 if a row failed."""
    options = tyro.cli(OrthonormalOptions, prog="python -m benchmarks.orthonormal")
    result = run(options)
    report(
        result,
        title="orthonormal map, forward + backward",
        columns=COLUMNS,
        json_only=options.json,
        output=options.output,
    )
    sys.exit(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    main()
