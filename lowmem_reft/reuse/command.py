"""``lowmem-reft reuse``: the stores that ``train --reuse`` leaves on the disk, listed and removed.

No torch is imported here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

from rich.console import Console
from rich.table import Table

from lowmem_reft.errors import InputError
from lowmem_reft.options import ReuseCommandOptions, ReuseListOptions, ReuseRemoveOptions
from lowmem_reft.reuse.disk import StoreInfo, find_stores, remove, remove_temporary

_FACTS = ("architecture", "num_blocks", "dtype")


def run_reuse(options: ReuseCommandOptions) -> dict[str, Any]:
    """List or remove stores; print what there is or was on standard output.

    Returns:
        ``reuse_dir`` and, of ``ls``, ``stores`` (``name``, ``key``, ``size_bytes``, ...) and
        ``total_bytes``; of ``rm``, the names of those ``removed``, the names of those ``kept``
        because they are being built, ``freed_bytes`` (once no process has them open) and
        ``num_temporary_files`` removed from other stores.

    Raises:
        InputError: There is no such directory, a key is unknown or ambiguous (nothing is removed
            then), or files cannot be removed.
    """
    action = options.action
    stores = find_stores(action.reuse_dir)
    if isinstance(action, ReuseListOptions):
        result = {
            "stores": [_as_json(store) for store in stores],
            "total_bytes": sum(store.num_bytes for store in stores),
        }
        if not action.json:
            _print_stores(stores)
    else:
        try:
            result = _remove_all(stores, _chosen(stores, action, now_s=time.time()))
        except OSError as error:
            raise InputError(
                "reuse_dir must hold stores that may be removed, got "
                f"{str(action.reuse_dir)!r}; change its permissions ({error})"
            ) from error
        if not (action.json or action.quiet):
            _print_removed(result)
    return {"reuse_dir": str(action.reuse_dir), **result}


def _as_json(store: StoreInfo) -> dict[str, Any]:
    used = datetime.fromtimestamp(store.last_used_s, timezone.utc)
    return {
        "name": store.directory.name,
        "key": store.key,
        **{name: store.manifest.get(name) for name in _FACTS},
        "num_shards": store.num_shards,
        "size_bytes": store.num_bytes,
        "last_used": used.isoformat(timespec="seconds"),
        "locked": store.locked,
    }


def _chosen(
    stores: Sequence[StoreInfo], options: ReuseRemoveOptions, *, now_s: float
) -> list[StoreInfo]:
    """Return the stores that the options name, each once."""
    chosen = [_find(stores, key) for key in options.keys] if options.keys else list(stores)
    if options.older_than_days is not None:
        oldest_kept_s = now_s - options.older_than_days * 24 * 3600
        chosen = [store for store in chosen if store.last_used_s < oldest_kept_s]
    return list({store.directory: store for store in chosen}.values())


def _find(stores: Sequence[StoreInfo], key: str) -> StoreInfo:
    """Return the one store whose name or key is, or begins with, what is given."""
    names = {store.directory: (store.directory.name, store.key) for store in stores}
    found = [store for store in stores if key in names[store.directory]] or [
        store
        for store in stores
        if key and any(name.startswith(key) for name in names[store.directory])
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"keys must name one store each, got {key!r}, which is "
            f"{', '.join(store.directory.name for store in found)}; give more of it"
        )
    raise InputError(
        f"keys must name stores, got {key!r}, which is none; lowmem-reft reuse ls lists them"
    )


def _remove_all(stores: Sequence[StoreInfo], chosen: Sequence[StoreInfo]) -> dict[str, Any]:
    removed: list[StoreInfo] = []
    kept: list[StoreInfo] = []
    for store in chosen:
        with suppress(FileNotFoundError):  # another process has removed it meanwhile
            (removed if remove(store.directory) else kept).append(store)
    others = [store for store in stores if store not in removed]
    return {
        "removed": [store.directory.name for store in removed],
        "kept": [store.directory.name for store in kept],
        "freed_bytes": sum(store.num_bytes for store in removed),
        "num_temporary_files": sum(remove_temporary(store.directory) for store in others),
    }


def _print_stores(stores: Sequence[StoreInfo]) -> None:
    console = Console(highlight=False, markup=False)
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
        table.add_row(
            store.directory.name,
            *(str(store.manifest.get(name, "–")) for name in _FACTS),
            _mib(store.num_bytes),
            str(store.num_shards),
            datetime.fromtimestamp(store.last_used_s).strftime("%Y-%m-%d %H:%M"),
            "being built" if store.locked else "",
        )
    console.print(table)
    console.print(f"{_mib(sum(store.num_bytes for store in stores))} MiB in all")


def _print_removed(result: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
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
