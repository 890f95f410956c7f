"""The process of one cell: how it is started, what it leaves, how it died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from lowmem_reft.compare.cell import (
    EMPTY_RESULT,
    Cell,
    Result,
    failed_result,
    read_cell,
    what_is_wrong,
)
from lowmem_reft.machine.files import open_itself, parse_json, write_json

CHILD_COMMAND = (sys.executable, "-m", "lowmem_reft.compare.child")
"""What runs one cell; the path of its ``cell.json`` is appended."""

LOG_FILE = "log.txt"
"""What the process says, in the directory of its cell."""

# A parent that is killed cannot stop its child, which would go on writing where the next run of
# the same command writes. The kernel can, and what it is told outlives exec.
PR_SET_PDEATHSIG = 1
"""The option of Linux's ``prctl`` that names the signal which the parent's death sends."""

_DIE_WITH_PARENT = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class Process(Protocol):
    """What is asked of a process: a part of ``subprocess.Popen``."""

    returncode: int | None

    def poll(self) -> int | None:
        """Look whether it has ended."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end."""

    def terminate(self) -> None:
        """Ask it to end."""

    def kill(self) -> None:
        """End it."""


def dying_with_parent(command: Sequence[str]) -> list[str]:
    """The command of a process that on Linux dies with this one."""
    if sys.platform != "linux":
        return [*command]
    return [sys.executable, "-ISc", _DIE_WITH_PARENT, str(os.getpid()), *command]


def start_child(
    command: Sequence[str], cell_path: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Start the process of the cell in ``cell_path``; on Linux it dies with this process."""
    words = dying_with_parent([*command, str(cell_path)])
    with open_itself(cell_path.parent / LOG_FILE, "wb") as log:
        return subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )


def leave_result(cell_path: Path, run: Callable[[Cell], Result]) -> int:
    """Run the cell described in ``cell_path`` and write its result; 0, or 1 if ``run`` raised."""
    cell, start = read_cell(cell_path), time.perf_counter()
    try:
        result = run(cell)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        result = failed_result(cell, message, time.perf_counter() - start)
    write_json(cell.result_path, result)
    return 1 if result["error"] else 0


def join_child(process: Process, timeout_s: float) -> None:
    """Wait for a process that was asked to end, and end it if it does not."""
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def available_threads() -> int:
    """Threads that OMP_NUM_THREADS grants, else the cores that this process may use."""
    granted = os.environ.get("OMP_NUM_THREADS", "")
    if granted.isdecimal():
        return max(1, int(granted))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_result(cell: Cell) -> Result | None:
    """The content of the cell's ``result.json``; None if there is none that is whole and sound."""
    return stored_result(cell.result_path)


def stored_result(path: Path) -> Result | None:
    """The content of a ``result.json``, the same way."""
    try:
        result = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return {**EMPTY_RESULT, **result} if what_is_wrong(result) is None else None


def result_or_cause(cell: Cell, cause: str, wall_time_s: float) -> Result:
    """The result that the process left, or one that says why there is none, which is stored."""
    result = read_result(cell)
    if result is None:
        result = failed_result(cell, cause, wall_time_s)
        write_json(cell.result_path, result)
    return result


def cause_of_death(code: int, directory: Path) -> str:
    """Why a process that ended with this exit code left no result."""
    if code < 0:
        hint = "; out of memory?" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} ({signal.strsignal(-code)}){hint}"
    lines = (directory / LOG_FILE).read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"ended with exit code {code} and no result: {last}"
