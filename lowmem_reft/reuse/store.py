"""Numbers of a data set in a store: memory-mapped, checksummed, keyed by what made them.

``disk`` says what a store is and who may write to it. A shard's checksum is verified when it is
first read.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_reft.machine.devices import DTYPES
from lowmem_reft.machine.files import write_json, write_whole
from lowmem_reft.reuse import disk
from lowmem_reft.reuse.layout import Extent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowmem_reft.reuse.layout import Layout

VERSION = 2
"""Raised when the same inputs would be stored otherwise, so that old stores are built again."""

FREE_BYTES = 2**28
"""Disk space that is left alone."""
MOST_OPEN = 128
"""Shards that are mapped at once: each holds a file descriptor."""


class CorruptShardError(RuntimeError):
    """A shard does not hold what was written to it."""

    def __init__(self, path: Path, shard: int) -> None:
        super().__init__(f"{path} is damaged: its checksum is not the one in the manifest")
        self.shard = shard


@dataclass(frozen=True)
class Record:
    """What is stored of one example."""

    hidden: Tensor
    """(suffix, hidden): output of the last constant block, before any edit."""
    keys: Tensor
    """(layers, heads, prefix, head_dim): of the blocks above, rotated as they are used."""
    values: Tensor
    """The same shape."""

    def cpu(self) -> Record:
        """Return it on the CPU."""
        return Record(self.hidden.cpu(), self.keys.cpu(), self.values.cpu())


def key_of(facts: dict[str, Any]) -> str:
    """Return the name of the store that these facts determine (and the code's version)."""
    text = json.dumps({**facts, "version": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Store:
    """What is stored of one data set.

    Args:
        root: Directory of all stores.
        key: Name of this one (``key_of``).
        layout: What it holds.
        facts: What it was made from, written into the manifest for people.
    """

    def __init__(self, root: Path, key: str, layout: Layout, facts: dict[str, Any]) -> None:
        self.key = key
        self.directory = root / f"trunk-{key}"
        self.layout = layout
        self._facts = facts
        self._maps: dict[int, mmap.mmap] = {}
        self._verified: set[int] = set()
        self._manifest: dict[str, Any] = {"shards": {}}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from building the same store meanwhile; see ``disk.locked``."""
        with disk.locked(self.directory):
            self._read_manifest()
            yield

    def _read_manifest(self) -> None:
        found = disk.read_manifest(self.directory)
        self._manifest = found or {**self._facts, "version": VERSION, "shards": {}}
        with suppress(OSError):
            os.utime(self.directory / disk.MANIFEST)  # "last used", for those who make room

    @property
    def is_complete(self) -> bool:
        """Whether everything is there; reads the manifest."""
        self._read_manifest()
        return not self.missing_shards()

    def missing_shards(self) -> list[int]:
        """Return the shards that are not there whole."""
        sizes = disk.file_sizes(self.directory)
        return [
            shard
            for shard in range(len(self.layout.shards))
            if str(shard) not in self._manifest["shards"]
            or sizes.get(self._path(shard).name) != self._size(shard)
        ]

    def _size(self, shard: int) -> int:
        return sum(map(self.layout.num_bytes, self.layout.shards[shard]))

    def _path(self, shard: int) -> Path:
        return disk.shard_path(self.directory, shard)

    def check_room(self, limit_bytes: int | None) -> None:
        """Check that what is missing has room on the disk, and all of it within a limit.

        Raises:
            NoRoomError: It has not.
        """
        missing, total = sum(map(self._size, self.missing_shards())), self.layout.total_bytes
        if limit_bytes is not None and total > limit_bytes:
            raise disk.NoRoomError(
                f"it would take {total / 2**30:.2f} GiB, more than the limit of "
                f"{limit_bytes / 2**30:.2f} GiB"
            )
        parent = next(p for p in (self.directory, *self.directory.parents) if p.is_dir())
        free = shutil.disk_usage(parent).free
        if missing > free - FREE_BYTES:
            raise disk.NoRoomError(
                f"it would take {missing / 2**30:.2f} GiB more and the disk has "
                f"{free / 2**30:.2f} GiB free"
            )

    def write(self, shard: int, records: Sequence[Record]) -> None:
        """Write one shard, the whole records of its examples; it counts from when this returns.

        Raises:
            ValueError: They have not the sizes that the layout says.
        """
        self._check(shard, records)
        owned = zip(self.layout.shards[shard], records, strict=True)
        content = b"".join(_bytes(part) for one in owned for part in self._own(*one))

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        write_whole(self._path(shard), write)
        self._maps.pop(shard, None)
        self._verified.discard(shard)
        self._manifest["shards"][str(shard)] = zlib.crc32(content)
        write_json(self.directory / disk.MANIFEST, self._manifest)

    def _check(self, shard: int, records: Sequence[Record]) -> None:
        layout = self.layout
        for index, record in zip(layout.shards[shard], records, strict=True):
            shape = layout.shapes[index]
            kv = self._kv_size(shape.prefix)
            wanted = ((shape.suffix, layout.hidden_size), kv, kv)
            found = tuple(tuple(part.shape) for part in vars(record).values())
            dtype = record.hidden.dtype
            if (found, dtype) != (wanted, DTYPES[layout.dtype]):
                raise ValueError(
                    f"constants have sizes {found} and dtype {dtype}, not {wanted} and "
                    f"{layout.dtype}"
                )

    def _own(self, index: int, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """Return what of a record no example before it holds."""
        shape, layout = self.layout.shapes[index], self.layout
        hidden = layout.own_hidden(index).within(Extent(index, shape.prefix, shape.length))
        kv = layout.own_kv(index).within(Extent(index, 0, shape.prefix))
        return record.hidden[hidden], record.keys[:, :, kv], record.values[:, :, kv]

    def is_damaged(self, shard: int) -> bool:
        """Whether a shard does not hold what was written to it, read anew; it is missing then."""
        self._maps.pop(shard, None)
        self._verified.discard(shard)
        try:
            self._maps[shard] = self._open(shard)
        except CorruptShardError:
            self._manifest["shards"].pop(str(shard), None)
            return True
        return False

    def remove(self) -> None:
        """Delete the store, unless a process builds it; maps of it that are open stay valid."""
        self._maps.clear()
        with suppress(OSError):
            disk.remove(self.directory)

    def read(self, index: int) -> Record:
        """Return what is stored of an example, on the CPU.

        Raises:
            CorruptShardError: A shard does not hold what was written to it.
        """
        layout = self.layout
        hidden = [
            self._owned(extent.owner)[0][extent.within(layout.own_hidden(extent.owner))]
            for extent in layout.hidden_extents[index]
        ]
        kv = [
            [part[:, :, extent.within(layout.own_kv(extent.owner))] for part in parts]
            for extent in layout.kv_extents[index]
            for _, *parts in [self._owned(extent.owner)]
        ]
        return Record(_joined(hidden, 0), *(_joined(parts, 2) for parts in zip(*kv, strict=True)))

    def _kv_size(self, tokens: int) -> tuple[int, int, int, int]:
        layout = self.layout
        return layout.num_cached_layers, layout.num_kv_heads, tokens, layout.head_dim

    def _owned(self, index: int) -> list[Tensor]:
        """Return what an example owns, on the mapped file: hidden vectors, keys and values."""
        layout, dtype = self.layout, DTYPES[self.layout.dtype]
        shard, offset = layout.addresses[index]
        kv = self._kv_size(layout.own_kv(index).size)
        parts = []
        for size in ((layout.own_hidden(index).size, layout.hidden_size), kv, kv):
            count = math.prod(size)
            if count:
                numbers = torch.frombuffer(
                    self._map(shard), dtype=dtype, count=count, offset=offset
                )
            else:  # of keys and values: no block is above the last edited one
                numbers = torch.empty(0, dtype=dtype)
            parts.append(numbers.view(size))
            offset += count * dtype.itemsize
        return parts

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            self._maps[shard] = self._open(shard)
            for other in list(self._maps)[:-MOST_OPEN]:
                self._maps.pop(other, None)
        return self._maps[shard]

    def _open(self, shard: int) -> mmap.mmap:
        path = self._path(shard)
        try:
            with path.open("rb") as file:
                # Copy-on-write: torch wants writable memory, and the file stays as it is.
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (FileNotFoundError, ValueError) as error:
            raise CorruptShardError(path, shard) from error
        whole = len(content) == self._size(shard)
        if whole and shard in self._verified:
            return content
        if not whole or zlib.crc32(content) != self._manifest["shards"].get(str(shard)):
            content.close()
            raise CorruptShardError(path, shard)
        self._verified.add(shard)
        return content


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
