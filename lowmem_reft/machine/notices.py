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
    """A message of a library's logger (others may log the same words), by how it begins."""

    logger: str
    message: str

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is another message."""
        return re.match(self.message, record.getMessage()) is None


class Warned(NamedTuple):
    """A warning of a class, none of its parents, by how it begins."""

    category: type[Warning]
    message: str


LOGGED = (
    # That kernel has no backward pass; guard_linear4bit keeps every base of ours from it.
    Logged(
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward from kernels-community",
    ),
    # int8 quantizes its inputs by way of fp16, whatever they are; it is said for every layer.
    Logged("bitsandbytes.autograd._functions", "MatMul8bitLt: inputs will be cast from"),
    # Two checkpoints within a second, which are then told apart by their numbers, rightly.
    Logged("transformers.trainer_utils", "mtime may not be reliable on this filesystem"),
)

WARNED = (
    # get_peft_model asks transformers by the old name; both know the new one.
    Warned(FutureWarning, "`is_gradient_checkpointing` is deprecated"),
)

WRITTEN = (
    # torch 2.13 says when its profiler starts and stops.
    rb"USDT:.* SyncActivityProfilerHandler\.cpp:\d+\] profiler_(start|stop)$",
    # What was there before a measurement is none of it.
    rb"\[W.* CPUAllocator\.cpp:\d+\] Memory block of unknown size was allocated before",
)
"""Lines that native code writes to standard error, where Python cannot filter them."""


def hide() -> None:
    """Hide what ``LOGGED`` and ``WARNED`` list, in this process and for good."""
    for logged in LOGGED:
        logging.getLogger(logged.logger).addFilter(logged)
    for warned in WARNED:
        warnings.filterwarnings("ignore", warned.message, warned.category)


@contextmanager
def held(logger: str, message: str) -> Iterator[list[logging.LogRecord]]:
    """Hold back a logger's messages that contain ``message`` until it is known who needs them.

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
                if not any(re.match(known, line.rstrip()) for known in WRITTEN):
                    os.write(stderr, line)
            os.close(stderr)
