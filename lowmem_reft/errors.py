"""The exception that means "the user can fix this": the CLI prints its message and exits with 2."""

import errno
import math


class InputError(ValueError):
    """Bad input from the user: a wrong option, file or line.

    The message names the argument (or file and line), the rule and what to do:
    ``{name} must be {rule}, got {value!r}; {what to do}``.
    """


def check_counts(**counts: int | None) -> None:
    """Refuse counts below 1; None is one that was not given.

    Raises:
        InputError: One is below 1; the message names it.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} must be at least 1, got {count!r}; raise it")


def check_positive(**numbers: float | None) -> None:
    """Refuse numbers that are not finite and above 0; None is one that was not given.

    Raises:
        InputError: One is zero, negative, infinite or not a number; the message names it.
    """
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise InputError(f"{name} must be finite and above 0, got {number!r}; change it")


def check_not_negative(**numbers: float) -> None:
    """Refuse numbers that are not finite and at least 0.

    Raises:
        InputError: One is negative, infinite or not a number; the message names it.
    """
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise InputError(f"{name} must be finite and at least 0, got {number!r}; 0 is allowed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on the device or on the host."""
    # By their words: torch raises these as plain RuntimeErrors too, safetensors as its own class.
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def is_of_the_machine(error: BaseException) -> bool:
    """Whether an error is of a device, its memory or its disk, whatever was read meanwhile."""
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return is_full or is_out_of_memory(error) or "CUDA error" in str(error)
