"""Keeps notices of other libraries off the terminal that say nothing to who uses this package.

One entry per message, with its reason. What a user can act on is no entry and is shown as ever.
``import lowmem_reft`` hides them by name, before it imports the libraries that say them: commands,
recipes, benchmarks and programs are equally quiet, and no import is paid for it.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Logged(NamedTuple):
    """A message that a library logs."""

    logger: str
    """The logger that it comes from; others may log the same words."""
    message: str
    """Regular expression of its beginning."""
    reason: str
    """Why nobody needs it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is another message."""
        return re.match(self.message, record.getMessage()) is None


class Warned(NamedTuple):
    """A warning that a library gives."""

    category: type[Warning]
    """Its class, none of its parents."""
    message: str
    """Regular expression of its beginning."""
    reason: str
    """Why nobody needs it."""


class Written(NamedTuple):
    """A line that native code writes to standard error, where Python cannot filter it."""

    line: bytes
    """Regular expression of it."""
    reason: str
    """Why nobody needs it."""


LOGGED = (
    Logged(
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward from kernels-community",
        "that kernel has no backward pass; guard_linear4bit keeps every base of ours from it",
    ),
    Logged(
        "bitsandbytes.autograd._functions",
        "MatMul8bitLt: inputs will be cast from",
        "int8 quantizes its inputs by way of fp16, whatever they are; it is said for every layer",
    ),
    Logged(
        "transformers.trainer_utils",
        "mtime may not be reliable on this filesystem",
        "two checkpoints within a second, which are then told apart by their numbers, rightly",
    ),
)

WARNED = (
    Warned(
        FutureWarning,
        "`is_gradient_checkpointing` is deprecated",
        "get_peft_model asks transformers by the old name; both know the new one",
    ),
)

WRITTEN = (
    Written(
        rb"USDT:.* SyncActivityProfilerHandler\.cpp:\d+\] profiler_(start|stop)$",
        "torch 2.13 says when its profiler starts and stops",
    ),
    Written(
        rb"\[W.* CPUAllocator\.cpp:\d+\] Memory block of unknown size was allocated before",
        "what was there before a measurement is none of it",
    ),
)


def hide() -> None:
    """Hide what ``LOGGED`` and ``WARNED`` list, in this process and for good."""
    for logged in LOGGED:
        logging.getLogger(logged.logger).addFilter(logged)
    for warned in WARNED:
        warnings.filterwarnings("ignore", warned.message, warned.category)


@contextmanager
def held(logger: str, message: str) -> Iterator[list[logging.LogRecord]]:
    """Hold back a message until it is known whether anybody needs it.

    Args:
        logger: The one that it comes from.
        message: What occurs in it.

    Yields:
        The records that came; those that are left in it at the end, or at an error, are logged.
    """
    records: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if message not in record.getMessage():
            return True
        records.append(record)
        return False

    source = logging.getLogger(logger)
    source.addFilter(hold)
    try:
        yield records
    finally:
        source.removeFilter(hold)
        for record in records:
            source.handle(record)


@contextmanager
def written_hidden() -> Iterator[None]:
    """Hide what ``WRITTEN`` lists; all other lines on standard error come at the end."""
    import tempfile

    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as lines:
        os.dup2(lines.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            lines.seek(0)
            for line in lines:
                if not any(re.match(written.line, line.rstrip()) for written in WRITTEN):
                    os.write(stderr, line)
            os.close(stderr)
