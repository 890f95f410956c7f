"""The process that cells are forked from: ``python -m lowmem_reft.compare.nursery``.

It imports what every cell imports, which takes longer than a small cell, and then forks a process
for each. Such a copy has what a fresh process has after its imports, so it computes the same: no
thread, no model, no number drawn yet, nothing on a device. ``engines/forks.py`` asks for cells, a
line for each, and is answered with a line.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lowmem_reft.compare.engines.launch import LOG_FILE, PR_SET_PDEATHSIG, leave_result
from lowmem_reft.machine.files import open_itself

_CELLS = "lowmem_reft.compare.child"
"""What they run and need; imported by name, as a card is looked for before."""


def serve(may_fork: Callable[[], bool]) -> Path | None:
    """Fork a process for each cell that is asked for.

    Args:
        may_fork: Imports all that the processes are to have; whether they can be forked after that.

    Returns:
        In the process of a cell the path of its ``cell.json``; in this one None, when nobody asks
        any more.
    """
    # Ctrl-C is for the cells. Blocked, it waits for the moment in which a new one can take it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    replies = os.dup(1)
    os.dup2(2, 1)  # what is said meanwhile is no reply
    if not may_fork() or not _is_alone():
        return None
    codes: dict[int, int | None] = {}
    for line in iter(sys.stdin.buffer.readline, b""):
        number, verb, *words = json.loads(line)
        answer: int | None = None
        if verb == "start":
            parent = os.getpid()
            with suppress(OSError):  # no memory; those that run are not to suffer from that
                answer = os.fork()
            if answer == 0:
                os.close(replies)
                return _become(Path(words[0]), parent)
            if answer is not None:
                codes[answer] = None
        else:
            cell = words[0]
            if codes[cell] is None:
                found, status = os.waitpid(cell, os.WNOHANG)
                codes[cell] = os.waitstatus_to_exitcode(status) if found else None
            answer = codes[cell]
            if verb == "kill" and answer is None:
                os.kill(cell, words[1])
        os.write(replies, json.dumps([number, answer]).encode() + b"\n")
    return None


def _is_alone() -> bool:
    """Whether a copy would lack no thread: one that holds a lock would never give it back there.

    OpenBLAS ends its threads before a fork, and starts them again where it computes.
    """
    copy = os.fork()
    if copy == 0:
        os._exit(0)
    os.waitpid(copy, 0)
    return len(os.listdir("/proc/self/task")) == 1


def _become(cell_path: Path, parent: int) -> Path:
    """Make this copy the process of a cell, as if it had been started as one."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    with open_itself(cell_path.parent / LOG_FILE, "ab") as log, open(os.devnull, "rb") as nothing:
        with suppress(OSError):  # no file
            log.write(os.pread(2, 2**20, 0))  # what was said while all was imported
            log.flush()
        for handle, file in enumerate((nothing, log, log)):
            os.dup2(file.fileno(), handle)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return cell_path


def _import_all() -> bool:
    """Import what cells need; False where they cannot be forked.

    Where there is a card, libraries look for it while they are imported, and what CUDA has then
    begun is not there after a fork.
    """
    # A background thread of pyarrow's allocator would not be in the copies.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    import torch

    if torch.cuda.is_available():
        return False
    importlib.import_module(_CELLS)
    gc.collect()
    gc.freeze()  # nothing of this is garbage in a cell; looking at it would also copy it
    return True


def main() -> int:
    """Serve; in the process of a cell, run it. Returns the exit code."""
    cell_path = serve(_import_all)
    if cell_path is None:
        os._exit(0)  # nothing to tidy up, and much to take down
    return leave_result(cell_path, importlib.import_module(_CELLS).run_cell)


if __name__ == "__main__":
    sys.exit(main())
