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
import zlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_reft.machine.devices import DTYPES
from lowmem_reft.machine.files import write_json
from lowmem_reft.reuse import disk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lowmem_reft.reuse.layout import Layout, Run

VERSION = 2
"""Raised when the same inputs would be stored otherwise, so that old stores are built again."""

MOST_OPEN = 128
"""Shards that are mapped at once: each holds a file descriptor."""


class CorruptShardError(RuntimeError):
    """A shard does not hold what was written to it."""

    def __init__(self, path: Path, shard: int) -> None:
        super().__init__(f"{path} is damaged: its checksum is not the one in the manifest")
        self.shard = shard


@dataclass(frozen=True)
class Record:
    """The constants of one example."""

    hidden: Tensor
    """(suffix, hidden): output of the last constant block, before any edit."""
    keys: Tensor
    """(layers, heads, prefix, head_dim): of the blocks above, rotated as they are used."""
    values: Tensor
    """The same shape."""


def key_of(facts: dict[str, Any]) -> str:
    """Return the name of the store that these facts determine (and the code's version)."""
    text = json.dumps({**facts, "version": VERSION}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


class Store:
    """The constants of one data set.

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
        """Keep other processes from building the same store meanwhile.

        Raises:
            InputError: the directory cannot be written to.
        """
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
        """Check that there is room for what is missing, and for all of it within a limit.

        Raises:
            NoRoomError: there is none.
        """
        missing = sum(self._size(shard) for shard in self.missing_shards())
        disk.check_room(self.directory, missing, self.layout.total_bytes, limit_bytes)

    def write(self, shard: int, records: Sequence[Record]) -> None:
        """Write one shard; it counts from when this returns.

        Args:
            shard: Which.
            records: The whole constants of its examples, in the layout's order.

        Raises:
            ValueError: they have not the sizes that the layout says.
        """
        self._check(shard, records)
        path, crc = self._path(shard), 0
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                for index, record in zip(self.layout.shards[shard], records, strict=True):
                    for part in self._own(index, record):
                        content = _bytes(part)
                        crc = zlib.crc32(content, crc)
                        file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._maps.pop(shard, None)
        self._verified.discard(shard)
        self._manifest["shards"][str(shard)] = crc
        write_json(self.directory / disk.MANIFEST, self._manifest)

    def _check(self, shard: int, records: Sequence[Record]) -> None:
        layout = self.layout
        for index, record in zip(layout.shards[shard], records, strict=True):
            shape = layout.shapes[index]
            kv = (layout.num_cached_layers, layout.num_kv_heads, shape.prefix, layout.head_dim)
            wanted = ((shape.suffix, layout.hidden_size), kv, kv)
            found = tuple(tuple(part.shape) for part in (record.hidden, record.keys, record.values))
            if found != wanted or record.hidden.dtype != DTYPES[layout.dtype]:
                raise ValueError(
                    f"constants have sizes {found} and dtype {record.hidden.dtype}, not {wanted} "
                    f"and {layout.dtype}"
                )

    def _own(self, index: int, record: Record) -> tuple[Tensor, Tensor, Tensor]:
        """Return what of a record no example before it holds."""
        prefix = self.layout.shapes[index].prefix
        hidden, kv = self.layout.own_hidden(index), self.layout.own_kv(index)
        return (
            record.hidden[hidden.start - prefix : hidden.stop - prefix],
            record.keys[:, :, kv.start : kv.stop],
            record.values[:, :, kv.start : kv.stop],
        )

    def is_sound(self, shard: int) -> bool:
        """Whether a shard holds what was written to it, read anew."""
        self._maps.pop(shard, None)
        self._verified.discard(shard)
        try:
            self._maps[shard] = self._open(shard)
        except CorruptShardError:
            return False
        return True

    def forget(self, shard: int) -> None:
        """Make a shard count as missing."""
        self._manifest["shards"].pop(str(shard), None)
        self._maps.pop(shard, None)

    def remove(self) -> None:
        """Delete the store, unless a process builds it; maps of it that are open stay valid."""
        self._maps.clear()
        with suppress(OSError):
            disk.remove(self.directory)

    def read(self, index: int) -> Record:
        """Return the constants of an example, on the CPU.

        Raises:
            CorruptShardError: a shard does not hold what was written to it.
        """
        layout = self.layout
        hidden = [self._hidden(run) for run in layout.hidden_runs(index)]
        kv = [self._keys_and_values(run) for run in layout.kv_runs(index)]
        nothing = torch.empty(
            (layout.num_cached_layers, layout.num_kv_heads, 0, layout.head_dim),
            dtype=DTYPES[layout.dtype],
        )
        return Record(
            _joined(hidden, 0) if hidden else nothing.new_empty(0, layout.hidden_size),
            _joined([part[0] for part in kv], 2) if kv else nothing,
            _joined([part[1] for part in kv], 2) if kv else nothing,
        )

    def _hidden(self, run: Run) -> Tensor:
        """Return hidden vectors that stand together, (tokens, hidden)."""
        layout, own = self.layout, self.layout.own_hidden(run.owner)
        size = (run.stop - run.start, layout.hidden_size)
        return self._numbers(run.owner, (run.start - own.start) * layout.hidden_bytes, size)

    def _keys_and_values(self, run: Run) -> tuple[Tensor, Tensor]:
        """Return keys and values that stand together, (layers, heads, tokens, head_dim) each."""
        layout, own = self.layout, self.layout.own_kv(run.owner)
        hidden = layout.own_hidden(run.owner)
        tokens = own.stop - own.start
        size = (layout.num_cached_layers, layout.num_kv_heads, tokens, layout.head_dim)
        offset = (hidden.stop - hidden.start) * layout.hidden_bytes
        kept = slice(run.start - own.start, run.stop - own.start)
        keys = self._numbers(run.owner, offset, size)
        values = self._numbers(run.owner, offset + tokens * layout.kv_bytes // 2, size)
        return keys[:, :, kept], values[:, :, kept]

    def _numbers(self, owner: int, offset: int, size: tuple[int, ...]) -> Tensor:
        """Return a tensor on the mapped file, from a byte of what an example owns."""
        shard, start = self.layout.places[owner]
        dtype = DTYPES[self.layout.dtype]
        if 0 in size:  # no block is above the last edited one
            return torch.empty(size, dtype=dtype)
        content = self._maps.get(shard)
        if content is None:
            content = self._maps[shard] = self._open(shard)
            for other in list(self._maps)[:-MOST_OPEN]:
                self._maps.pop(other, None)
        return torch.frombuffer(
            content,
            dtype=dtype,
            count=math.prod(size),
            offset=start + offset,
        ).view(size)

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
