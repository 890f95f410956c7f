"""What takes too long or too much memory is stopped, and the limits do not stay."""

from __future__ import annotations

import contextlib
import re
import threading

import pytest

from lowmem_reft.machine.limits import TimeLimitError, memory_limit, time_limit


def _run_on() -> None:
    with contextlib.suppress(TimeLimitError):  # the next one comes
        while True:
            pass
    while True:
        pass


def test_python_and_regular_expressions_are_stopped() -> None:
    with pytest.raises(TimeLimitError), time_limit(0.05):
        re.match("(a+)+$", "a" * 40 + "b")
    with pytest.raises(TimeLimitError), time_limit(0.05):
        _run_on()
    sum(range(10**6))  # nothing comes later


def test_outside_of_the_main_thread_there_is_no_limit() -> None:
    done = []

    def work() -> None:
        with time_limit(0.001):
            done.append(sum(range(10**5)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_memory_beyond_the_limit_is_not_given() -> None:
    with pytest.raises(MemoryError), memory_limit(2**26):
        bytearray(2**29)
    bytearray(2**29)
