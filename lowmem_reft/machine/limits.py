"""Limits of time and memory for what files of others make this process compute.

Templates and regular expressions are programs, and there are short ones that never end.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_AGAIN_S = 0.5
"""If something has swallowed the exception, the next one comes after this time."""


class TimeLimitError(BaseException):
    """A computation took too long; no ``except Exception`` on the way keeps it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Stop what takes more than so many seconds of the processor's time.

    Python and its regular expressions can be stopped, and in the main thread alone, as signals
    come there: elsewhere there is no limit.

    Raises:
        TimeLimitError: It took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    running = True

    def stop(_signum: int, _frame: object) -> None:
        if running:
            raise TimeLimitError

    previous = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN_S)
    try:
        yield
    finally:
        running = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)


@contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Let allocations fail (``MemoryError``) that take this process beyond so many bytes more.

    Elsewhere than on Linux there is no limit.
    """
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        yield
        return
    now = int(pages.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    known = [
        now + more_bytes,
        *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY),
    ]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
