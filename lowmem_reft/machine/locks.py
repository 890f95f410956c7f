"""A directory that one process at a time writes to; a killed one leaves it free."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
"""What file systems that know no locks answer."""


@contextmanager
def alone(directory: Path, lock: Path, *, name: str = "output_dir") -> Iterator[None]:
    """Keep other processes from writing to a directory meanwhile.

    Args:
        directory: What is written to.
        lock: The file that is locked; its directory is made if need be. It stays when it is free
            again: a process that had opened it before it was removed would lock another one.

        name: The option that says which.

    Raises:
        InputError: Another process is writing there, or the file cannot be made.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise InputError(
            f"{name} must be a directory that can be written to, got {str(directory)!r}; "
            f"choose another ({error.strerror}: {error.filename})"
        ) from error
    with os.fdopen(handle, "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            whose = file.read().strip()
            raise InputError(
                f"{name} must be written to by one run at a time, got {str(directory)!r}, where "
                f"another one{f' ({whose})' if whose else ''} is at work; wait for it, end it, or "
                "choose another directory"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("nothing keeps a second process out of %s: %s", directory, error)
        file.truncate()
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
