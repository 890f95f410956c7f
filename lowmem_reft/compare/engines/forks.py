"""Cells as copies of one process that has imported what all of them need; on Linux.

Elsewhere a process that has loaded such libraries cannot be copied safely (macOS), or not at all.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_reft.compare.engines.launch import LOG_FILE, dying_with_parent
from lowmem_reft.machine.files import open_itself

NURSERY_COMMAND = (sys.executable, "-m", "lowmem_reft.compare.nursery")
"""What cells are forked from."""

_POLL_S = 0.02


class NoForkError(RuntimeError):
    """The nursery is gone, or will not fork here; a cell has to start as a process of its own."""


class Nursery:
    """The process that cells are forked from."""

    def __init__(self, environment: dict[str, str], command: Sequence[str]) -> None:
        """Start it by ``command``, with the environment that its cells will have."""
        self._num_asked = 0
        with tempfile.TemporaryFile() as said:  # it copies that into the logs
            self._process = subprocess.Popen(
                dying_with_parent(command),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
            )

    def start(self, cell_path: Path) -> Fork:
        """Start the process of a cell.

        Raises:
            NoForkError: It has to be started in another way.
        """
        with open_itself(cell_path.parent / LOG_FILE, "wb"):
            pass
        pid: int | None = self.ask("start", str(cell_path.absolute()))
        if pid is None:
            raise NoForkError("there is no memory for a copy")
        return Fork(self, pid)

    def ask(self, *words: str | int) -> Any:
        """Ask it, and return the answer; see ``compare/nursery.py``.

        Raises:
            NoForkError: There is none.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self._num_asked += 1
        number = None
        try:
            stdin.write(json.dumps([self._num_asked, *words]).encode() + b"\n")
            stdin.flush()
            while number != self._num_asked:  # one before, whose answer Ctrl-C kept us from reading
                number, answer = json.loads(stdout.readline())
        except (OSError, ValueError) as error:
            raise NoForkError("the nursery is gone") from error
        return answer

    def close(self) -> None:
        """End it, and what it has forked."""
        self._process.kill()
        self._process.communicate()


class Fork:
    """The process of a cell, with what is used of ``subprocess.Popen``."""

    returncode: int | None = None
    """None while the process runs, as far as is known."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        """Take charge of a process that the nursery has forked."""
        self.pid = pid
        self._nursery = nursery

    def poll(self) -> int | None:
        """Look whether the process has ended, and return its exit code if it has."""
        return self._ask("poll")

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; ``subprocess.TimeoutExpired`` after so many seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            time.sleep(_POLL_S)
        return code

    def terminate(self) -> None:
        """Ask the process to end."""
        self._ask("kill", signal.SIGTERM)

    def kill(self) -> None:
        """End the process."""
        self._ask("kill", signal.SIGKILL)

    def _ask(self, verb: str, *words: int) -> int | None:
        if self.returncode is None:
            try:
                self.returncode = self._nursery.ask(verb, self.pid, *words)
            except NoForkError:
                self.returncode = -signal.SIGKILL  # it took its processes with it
        return self.returncode
