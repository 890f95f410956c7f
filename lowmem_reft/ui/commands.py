"""A command of ``lowmem-reft`` for the page: its words, its process, and what it says.

The process is one of its own, as it is from a terminal: what goes wrong in it, memory that it runs
out of included, leaves the page alone, and all of its memory is given back when it ends.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

from lowmem_reft.errors import InputError
from lowmem_reft.options import written

_COLUMNS = "100"
"""Width that tables are printed for."""

_STEP = re.compile(r"^step (\d+)/\d+ loss (\S+)(?:.* peak (\S+) GiB)?", re.MULTILINE)
"""What ``runs.said`` prints of a step."""


def words_of(command: str, more: str = "", **options: Any) -> list[str]:
    """Return the words of a command line.

    Args:
        command: The subcommand.
        more: Further flags, as they are typed.
        options: Values by the names of options; what was left empty is left out.

    Raises:
        InputError: ``more`` ends within a quotation.
    """
    try:
        further = shlex.split(more)
    except ValueError as error:
        raise InputError(
            f"more flags must be written as on a command line, got {more!r} ({error}); close it"
        ) from error
    words = [command]
    for name, value in options.items():
        if value not in (None, ""):
            words += [written.flag(name), str(value)]
    return words + further


def steps_of(text: str) -> dict[str, list[float]]:
    """Return ``step``, ``loss`` and ``peak`` (GiB) of each step that a training has reported."""
    found = [[float(number or "nan") for number in step] for step in _STEP.findall(text)]
    columns = list(zip(*found, strict=True)) or [()] * 3
    return dict(zip(("step", "loss", "peak"), map(list, columns), strict=True))


class Command:
    """A command that runs.

    Args:
        words: The subcommand and its flags.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.line = shlex.join(["lowmem-reft", *words])
        """The same from a terminal."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - the next line closes it
        weakref.finalize(self, self._said.close)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lowmem_reft", *words],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": _COLUMNS},
        )

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def text(self) -> str:
        """Return what it has said so far."""
        descriptor = self._said.fileno()
        # By its place: the process writes on where this one would have read to.
        said = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        return said.decode(errors="replace")

    def wait(self) -> str:
        """Wait until it has ended, and return what it has said."""
        self._process.wait()
        return self.text()

    def stop(self) -> None:
        """End it as Ctrl-C does, and wait: a training keeps its last checkpoint."""
        if self.code is None:
            self._process.terminate()
            self._process.wait()
