"""The guardian of stores: what one is, whether it is whole, who may write to it, how it goes.

A store is a directory ``<kind>-<key>`` with a manifest, a lock and shards. A shard counts only once
the manifest names it, and the manifest is replaced atomically, so a killed build goes on where it
stopped. Nothing else is touched, neither other directories nor files in a store that are not its
own. No torch is imported here.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import open_itself, parse_json

MANIFEST, LOCK = "manifest.json", "lock"
_NAME = re.compile(r"[a-z][a-z_-]*-(?P<key>[0-9a-f]{24})")
_SHARD = re.compile(r"shard-\d+\.bin")


class ReuseError(Exception):
    """Why nothing can be reused here, in words that end a sentence."""


class NoRoomError(ReuseError):
    """The disk, or the limit, has no room for a store."""


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What can be said of a store without reading its shards."""

    directory: Path
    """Where it is; its name ends in the key."""
    manifest: dict[str, Any]
    """What it was made from; empty where that is not known."""
    num_shards: int
    """Shards that the manifest names and that are there."""
    num_bytes: int
    """Size of its files."""
    last_used_s: float
    """When the manifest was last written or touched, as a Unix time."""
    locked: bool
    """Whether a running process is building it."""

    @property
    def key(self) -> str:
        """The name without the kind."""
        return self.directory.name.rpartition("-")[2]


def shard_path(directory: Path, shard: int) -> Path:
    """Return where a store keeps one of its shards."""
    return directory / f"shard-{shard:05d}.bin"


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """Return what a manifest says; None if there is none that is sound."""
    try:
        manifest = parse_json((directory / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return None
    is_sound = isinstance(manifest, dict) and isinstance(manifest.get("shards"), dict)
    return manifest if is_sound else None


def file_sizes(directory: Path) -> dict[str, int]:
    """Return the bytes of each file that is a store's own, by name."""
    sizes = {}
    with suppress(FileNotFoundError):  # there is no store yet
        for path in filter(_is_own, directory.iterdir()):
            with suppress(FileNotFoundError):  # a temporary file that has got its name meanwhile
                sizes[path.name] = path.stat().st_size
    return sizes


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from writing to a store meanwhile; wait for one that does.

    Raises:
        InputError: The directory cannot be written to.
    """
    try:
        handle = _wait_for_lock(directory)
    except OSError as error:
        raise InputError(
            f"reuse_dir must be a directory that can be written to, got "
            f"{str(directory.parent)!r}; choose another ({error.strerror})"
        ) from error
    with handle:
        _remove_temporary(directory)  # of a killed build: one that runs holds the lock
        yield


def _wait_for_lock(directory: Path) -> IO[str]:
    """Wait for the lock on the file that other processes find under its name."""
    path = directory / LOCK
    if directory.is_symlink():
        raise InputError(
            f"reuse_dir must not hold links in place of stores, got {str(directory)!r}; remove it"
        )
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack, suppress(FileNotFoundError):  # the store is being removed
            handle = stack.enter_context(open_itself(path, "w"))
            fcntl.flock(handle, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                stack.pop_all()
                return handle


def _is_free(handle: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    """Take a lock, if no process has it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def remove(directory: Path) -> bool:
    """Remove a store, unless a process is building it; return whether it was removed.

    Processes that have mapped its shards go on reading them: the system frees a file when the last
    one has closed it. The manifest goes first, so a store that is half removed counts as missing,
    and the lock last: it still counts as a store, and who gets the lock then sees that it has no
    name any more.
    """
    with open_itself(directory / LOCK, "a") as handle:
        if not _is_free(handle):
            return False
        names = [MANIFEST, *sorted(file_sizes(directory).keys() - {MANIFEST, LOCK}), LOCK]
        for name in names:
            (directory / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds files that are not the store's
            directory.rmdir()
        return True


def remove_temporary(directory: Path) -> int:
    """Remove what killed builds left, and return how many files; a running build is left alone."""
    if not any(directory.glob("*.tmp")):
        return 0
    with open_itself(directory / LOCK, "a") as handle:
        return _remove_temporary(directory) if _is_free(handle) else 0


def _remove_temporary(directory: Path) -> int:
    paths = list(directory.glob("*.tmp"))
    for path in paths:
        path.unlink(missing_ok=True)
    return len(paths)


def find_stores(root: Path) -> list[StoreInfo]:
    """Return the stores in a directory, the one used last first.

    Raises:
        InputError: There is no such directory.
    """
    if not root.is_dir():
        raise InputError(
            f"reuse_dir must be an existing directory, got {str(root)!r}; give the --reuse-dir of "
            "train, or reuse in a run's --output-dir"
        )
    stores = []
    for directory in root.iterdir():
        with suppress(FileNotFoundError):  # another process is removing it
            if _is_store(directory):
                stores.append(_describe(directory))
    return sorted(stores, key=lambda store: (-store.last_used_s, store.directory.name))


def _is_store(directory: Path) -> bool:
    """Whether the name is a store's and it has a manifest, or nothing but parts of a store."""
    if not _NAME.fullmatch(directory.name) or directory.is_symlink() or not directory.is_dir():
        return False
    return read_manifest(directory) is not None or all(map(_is_own, directory.iterdir()))


def _is_locked(directory: Path) -> bool:
    with suppress(FileNotFoundError), (directory / LOCK).open() as handle:
        return not _is_free(handle, fcntl.LOCK_SH)  # two listings are not in each other's way
    return False


def _is_own(path: Path) -> bool:
    named = path.name in (MANIFEST, LOCK) or path.suffix == ".tmp"
    return not path.is_dir() and (named or _SHARD.fullmatch(path.name) is not None)


def _describe(directory: Path) -> StoreInfo:
    manifest, sizes = read_manifest(directory) or {}, file_sizes(directory)
    shards = (int(shard) for shard in manifest.get("shards", ()) if shard.isdecimal())
    stamped = directory / MANIFEST if MANIFEST in sizes else directory
    return StoreInfo(
        directory=directory,
        manifest=manifest,
        num_shards=sum(shard_path(directory, shard).name in sizes for shard in shards),
        num_bytes=sum(sizes.values()),
        last_used_s=stamped.stat().st_mtime,
        locked=_is_locked(directory),
    )
