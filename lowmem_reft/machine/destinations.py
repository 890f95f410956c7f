"""Where outputs go, tried before the work: nothing of the user's is lost or in the way.

A path that is written must not be a link: what is written would go where the link leads, which may
be a file of the user's. A directory that the user names may be one; what is written in it may not.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json

Sources = Mapping[str, str | Path | None]
"""What is read, by the option that names it: a file, a directory, a hub id, or nothing."""

_NOTHING: Sources = MappingProxyType({})


def check_file(
    name: str,
    path: Path,
    *,
    sources: Sources = _NOTHING,
    is_ours: Callable[[Path], bool] | None = None,
) -> None:
    """Refuse a file that cannot be written, or that holds what is not ours to replace.

    Args:
        name: The option that names it.
        path: The file, which need not be there, nor the directories above it; or a device.
        sources: What is read meanwhile, under whatever name.
        is_ours: Whether a file that is there may be replaced; without it, any may.

    Raises:
        InputError: It may not be written.
        OSError: The disk is full.
    """
    _check_name(name, path)
    # The system's own links (/dev/stdout) lead where the user has sent the output.
    if path.is_symlink() and path.parent != Path("/dev"):
        raise InputError(
            f"{name} must not be a link, got {str(path)!r}, which leads to "
            f"{str(path.readlink())!r}; name the file itself"
        )
    if path.is_dir():
        raise InputError(f"{name} must be a file, got the directory {str(path)!r}; name a file")
    check_not_read(name, path, sources)
    if path.exists():
        if not os.access(path, os.W_OK):
            raise InputError(
                f"{name} must be a file that may be written, got {str(path)!r} (Permission "
                "denied); name another one"
            )
        if not path.is_file():
            return  # a device or a pipe
        if is_ours is not None and path.stat().st_size and not is_ours(path):
            raise InputError(
                f"{name} must be a new file, or one that this command wrote, got {str(path)!r}, "
                "which holds something else; name another one, or move it away"
            )
    _check_room(name, path.parent)


def check_directory(
    name: str,
    path: Path,
    *,
    written: Iterable[str] = (),
    shared: Iterable[str] = (),
    sources: Sources = _NOTHING,
    is_ours: Callable[[Path], bool] | None = None,
) -> None:
    """Refuse a directory in which outputs cannot be written or would replace what is not ours.

    Args:
        name: The option that names it.
        path: The directory, which need not be there.
        written: Patterns of what is written in it: of directories ``adapter/``, of files
            ``result.json``.
        shared: Patterns likewise, of what may hold files of others too, which stay.
        sources: What is read meanwhile: it may not be among what is written, nor in it.
        is_ours: Whether what is there and matches a pattern is of an earlier run, which may be
            replaced or completed; without it, any may.

    Raises:
        InputError: It may not be written.
        OSError: The disk is full.
    """
    _check_name(name, path)
    if os.path.lexists(path) and not path.is_dir():
        what = "a link that leads nowhere" if path.is_symlink() else "the file"
        raise InputError(f"{name} must be a directory, got {what}: {str(path)!r}; choose another")
    _check_room(name, path)
    own = [each for pattern in written for each in _matching(path, pattern)]
    others = [each for pattern in shared for each in _matching(path, pattern)]
    for each, is_directory in own + others:
        if each.is_symlink():
            raise InputError(
                f"{name} must not hold links where outputs go, got {str(each)!r}, which leads to "
                f"{str(each.readlink())!r}; remove the link, or choose another directory"
            )
        if each.is_dir() != is_directory:
            there, wanted = ("file", "directory") if is_directory else ("directory", "file")
            raise InputError(
                f"{name} must have room for the {wanted} {each.name}, got a {there} of that name "
                f"in {str(path)!r}; remove it, or choose another directory"
            )
    for each, _ in own:
        check_not_read(name, each, sources)
    if own and is_ours is not None and not is_ours(path):
        names = ", ".join(sorted({each.name for each, _ in own})[:3])
        raise InputError(
            f"{name} must be new, or of an earlier run of this command, got {str(path)!r} with "
            f"{names} of something else; choose another, or move these away"
        )


def read_or_none(path: Path) -> Any:
    """Return what a file of JSON holds; None if it is not there or holds something else."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _matching(directory: Path, pattern: str) -> list[tuple[Path, bool]]:
    """What is there under a pattern, and whether it should be a directory."""
    if not directory.is_dir():
        return []
    is_directory = pattern.endswith("/")
    # Not glob(), which leaves out a link that leads nowhere.
    found = [path for path in directory.iterdir() if path.match(pattern.rstrip("/"))]
    inside = [each for path in found if path.is_dir() and is_directory for each in path.iterdir()]
    links = [(path, path.is_dir()) for path in inside if path.is_symlink()]
    return [(path, is_directory) for path in found] + links


def _check_name(name: str, path: Path) -> None:
    """Refuse what the system does not take as a path."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # too long, a circle of links, a null character
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(
            f"{name} must be a path that can be opened, got {str(path)!r} ({why}); change it"
        ) from error


def check_not_read(name: str, path: Path, sources: Sources) -> None:
    """Refuse to write what is read, by another name too, or a directory that holds it.

    Raises:
        InputError: A source is there.
    """
    for option, source in sources.items():
        if source is None or not os.path.exists(source):
            continue
        read = Path(source).resolve()
        if path.exists() and any(path.samefile(each) for each in (read, *read.parents)):
            raise InputError(
                f"{name} must be another file than {option}, got {str(path)!r} for both; choose "
                "another"
                if path.is_file()
                else f"{name} must be another place than that of {option}, got {str(path)!r} with "
                f"{str(source)!r} in it; choose another"
            )


def _check_room(name: str, directory: Path) -> None:
    """Try whether files can be made in a directory, or where it would be made."""
    there = directory.absolute()
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no directory")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"{name} must be where files can be made, got {str(directory)!r} ({error.strerror}, "
            f"at {str(there)!r}); choose another place"
        ) from error
