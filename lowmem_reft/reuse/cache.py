"""``lowmem-reft cache``: the stores that ``train --reuse`` leaves on the disk, listed and removed.

A store is a directory ``<kind>-<key>`` as ``frozen/store.py`` writes it. Nothing else is touched,
neither other directories nor files in a store that are not its own. No torch is imported here.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowmem_reft.errors import InputError
from lowmem_reft.options import CacheListOptions, CacheOptions, CacheRemoveOptions

MANIFEST, LOCK = "manifest.json", "lock"
_NAME = re.compile(r"[a-z][a-z_-]*-(?P<key>[0-9a-f]{24})")
_SHARD = re.compile(r"shard-\d+\.bin")


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What can be said of a store without reading its shards."""

    directory: Path
    """Where it is; its name ends in the key."""
    architecture: str | None
    """Class of the base; None where no manifest says so."""
    num_blocks: int | None
    """Blocks whose outputs are constant."""
    dtype: str | None
    """bf16, fp16 or fp32."""
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

    def as_json(self) -> dict[str, Any]:
        """Return the fields for ``--json``."""
        return {
            "name": self.directory.name,
            "key": self.key,
            "architecture": self.architecture,
            "num_blocks": self.num_blocks,
            "dtype": self.dtype,
            "num_shards": self.num_shards,
            "size_bytes": self.num_bytes,
            "last_used": datetime.fromtimestamp(self.last_used_s, timezone.utc).isoformat(
                timespec="seconds"
            ),
            "locked": self.locked,
        }


def run_cache(options: CacheOptions) -> dict[str, Any]:
    """List or remove stores; print what there is or was on standard output.

    Returns:
        ``reuse_dir`` and, of ``ls``, ``stores`` (see ``StoreInfo.as_json``) and ``total_bytes``; of
        ``rm``, the names of those ``removed``, the names of those ``kept`` because they are being
        built, ``freed_bytes`` (once no process has them open) and ``num_temporary_files`` removed
        from other stores.

    Raises:
        InputError: there is no such directory, a key is unknown or ambiguous (nothing is removed
            then), or files cannot be removed.
    """
    action = options.action
    stores = find_stores(action.reuse_dir)
    if isinstance(action, CacheListOptions):
        result = {
            "reuse_dir": str(action.reuse_dir),
            "stores": [store.as_json() for store in stores],
            "total_bytes": sum(store.num_bytes for store in stores),
        }
        if not action.json:
            _print_stores(stores)
        return result
    chosen = select(stores, action, now_s=time.time())
    try:
        result = _remove_all(stores, chosen)
    except OSError as error:
        raise InputError(
            f"reuse_dir must hold stores that may be removed, got {str(action.reuse_dir)!r}; "
            f"change its permissions ({error})"
        ) from error
    if not (action.json or action.quiet):
        _print_removed(result)
    return {"reuse_dir": str(action.reuse_dir), **result}


def find_stores(root: Path) -> list[StoreInfo]:
    """Return the stores in a directory, the one used last first.

    Raises:
        InputError: there is no such directory.
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


def select(
    stores: Sequence[StoreInfo], options: CacheRemoveOptions, *, now_s: float
) -> list[StoreInfo]:
    """Return the stores that the options name.

    Raises:
        InputError: a key names no store, or several.
    """
    chosen = [_find(stores, key) for key in options.keys] if options.keys else list(stores)
    if options.older_than_days is not None:
        oldest_kept_s = now_s - options.older_than_days * 24 * 3600
        chosen = [store for store in chosen if store.last_used_s < oldest_kept_s]
    return list({store.directory: store for store in chosen}.values())


def remove_store(directory: Path) -> bool:
    """Remove a store, unless a process is building it; return whether it was removed.

    Processes that have mapped its shards go on reading them: the system frees a file when the last
    one has closed it. The manifest goes first, so a store that is half removed counts as missing,
    and the lock last, so that it still counts as a store.
    """
    with _locked(directory) as is_ours:
        if is_ours:
            (directory / MANIFEST).unlink(missing_ok=True)
            for path in sorted(directory.iterdir()):
                if _is_part(path) and path.name != LOCK:
                    path.unlink(missing_ok=True)
            (directory / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # it holds files that are not the store's
                directory.rmdir()
        return is_ours


def _remove_all(stores: Sequence[StoreInfo], chosen: Sequence[StoreInfo]) -> dict[str, Any]:
    removed: list[StoreInfo] = []
    kept: list[StoreInfo] = []
    for store in chosen:
        with suppress(FileNotFoundError):  # another process has removed it meanwhile
            (removed if remove_store(store.directory) else kept).append(store)
    others = [store for store in stores if store not in removed]
    return {
        "removed": [store.directory.name for store in removed],
        "kept": [store.directory.name for store in kept],
        "freed_bytes": sum(store.num_bytes for store in removed),
        "num_temporary_files": sum(_remove_temporary(store.directory) for store in others),
    }


def _remove_temporary(directory: Path) -> int:
    """Remove what killed builds left, and return how many files; a running build holds the lock."""
    if not any(directory.glob("*.tmp")):
        return 0
    with _locked(directory) as is_ours:
        paths = list(directory.glob("*.tmp")) if is_ours else []
        for path in paths:
            path.unlink(missing_ok=True)
        return len(paths)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Take the lock under which stores are built; yields whether it was free."""
    handle = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield _lock(handle, fcntl.LOCK_EX)
    finally:
        os.close(handle)


def _lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(directory: Path) -> bool:
    try:
        handle = os.open(directory / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _lock(handle, fcntl.LOCK_SH)  # shared: two listings are not in each other's way
    finally:
        os.close(handle)


def _is_store(directory: Path) -> bool:
    """Whether the name is a store's and it has a manifest, or nothing but parts of a store."""
    if not _NAME.fullmatch(directory.name) or directory.is_symlink() or not directory.is_dir():
        return False
    return _read_manifest(directory) is not None or all(map(_is_part, directory.iterdir()))


def _is_part(path: Path) -> bool:
    if path.is_dir():
        return False
    named = path.name in (MANIFEST, LOCK) or path.suffix == ".tmp"
    return named or _SHARD.fullmatch(path.name) is not None


def _read_manifest(directory: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), dict):
        return None
    return manifest


def _describe(directory: Path) -> StoreInfo:
    manifest = _read_manifest(directory) or {"shards": {}}
    sizes: dict[str, int] = {}
    for path in filter(_is_part, directory.iterdir()):
        with suppress(FileNotFoundError):  # a temporary file that has got its name meanwhile
            sizes[path.name] = path.stat().st_size
    named = {f"shard-{int(shard):05d}.bin" for shard in manifest["shards"] if shard.isdecimal()}
    stamped = directory / MANIFEST if MANIFEST in sizes else directory
    return StoreInfo(
        directory=directory,
        architecture=manifest.get("architecture"),
        num_blocks=manifest.get("num_blocks"),
        dtype=manifest.get("dtype"),
        num_shards=len(named & sizes.keys()),
        num_bytes=sum(sizes.values()),
        last_used_s=stamped.stat().st_mtime,
        locked=_is_locked(directory),
    )


def _find(stores: Sequence[StoreInfo], key: str) -> StoreInfo:
    """Return the one store whose name or key is, or begins with, what is given."""
    exact = [store for store in stores if key in (store.directory.name, store.key)]
    found = exact or [
        store
        for store in stores
        if key and (store.directory.name.startswith(key) or store.key.startswith(key))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"keys must name one store each, got {key!r}, which is "
            f"{', '.join(store.directory.name for store in found)}; give more of it"
        )
    raise InputError(
        f"keys must name stores, got {key!r}, which is none; lowmem-reft cache ls lists them"
    )


def _print_stores(stores: Sequence[StoreInfo]) -> None:
    console = Console(highlight=False)
    if not stores:
        console.print("no stores")
        return
    if not console.is_terminal:
        console.width = 160  # for grep: one line each
    table = Table(box=None, pad_edge=False)
    for title in ("store", "architecture", "blocks", "dtype", "MiB", "shards", "last used", ""):
        right = title in ("blocks", "MiB", "shards")
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for store in stores:
        facts = (store.architecture, store.num_blocks, store.dtype)
        table.add_row(
            store.directory.name,
            *("–" if value is None else str(value) for value in facts),
            _mib(store.num_bytes),
            str(store.num_shards),
            datetime.fromtimestamp(store.last_used_s).strftime("%Y-%m-%d %H:%M"),
            "being built" if store.locked else "",
        )
    console.print(table)
    console.print(f"{_mib(sum(store.num_bytes for store in stores))} MiB in all")


def _print_removed(result: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for name in result["removed"]:
        console.print(f"removed {name}")
    for name in result["kept"]:
        console.print(f"kept {name}: a running process is building it", style="yellow")
    if result["num_temporary_files"]:
        console.print(f"removed {result['num_temporary_files']} temporary files of killed runs")
    if not result["removed"] and not result["kept"]:
        console.print("no store to remove")
    console.print(f"{_mib(result['freed_bytes'])} MiB freed")


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"
