"""The exception that means "the user can fix this": the CLI prints its message and exits with 2."""

import errno
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input from the user: a wrong option, file or line.

    The message names the argument (or file and line), the rule and what to do:
    ``{name} must be {rule}, got {value!r}; {what to do}``.
    """


def check_counts(**counts: int | None) -> None:
    """Refuse counts below 1, or of more than 63 bits; None is one that was not given.

    Raises:
        InputError: One is; the message names it.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise InputError(f"{name} must be at least 1, got {count!r}; raise it")
        if count is not None and count > sys.maxsize:
            raise InputError(f"{name} must be at most {sys.maxsize}, got {count:.3e}; lower it")


MOST_OF_A_STEP = 10**6
"""Examples of a step, ranks: more is a slip of the keyboard."""


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Name the option in what is refused meanwhile.

    Raises:
        InputError: Something is.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def check_at_most(most: float, **numbers: float | None) -> None:
    """Refuse numbers above a bound; None is one that was not given.

    Raises:
        InputError: One is; the message names it.
    """
    for name, number in numbers.items():
        if number is not None and number > most:
            raise InputError(f"{name} must be at most {most:,}, got {number:.3e}; lower it")


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
    return is_full_disk(error) or is_out_of_memory(error) or "CUDA error" in str(error)


def is_full_disk(error: BaseException) -> bool:
    """Whether an error says that the disk, a quota or a limit has no room for what is written."""
    # By their words as well: safetensors and torch raise these as errors of their own.
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    words = ("no space left", "quota exceeded", "file too large", "unexpected pos")
    said = str(error).lower()
    causes = (error.__cause__, error.__context__)
    return (
        getattr(error, "errno", None) in full
        or any(word in said for word in words)
        or any(cause is not None and is_full_disk(cause) for cause in causes)
    )


_OF_THE_PATH = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EINVAL, errno.ENXIO),
)


def is_wrong_path(error: BaseException) -> bool:
    """Whether the system refuses a path, which another path mends."""
    return isinstance(error, OSError) and bool(error.filename) and error.errno in _OF_THE_PATH
