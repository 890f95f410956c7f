"""Constants of a data set on disk: memory-mapped, checksummed, resumable, keyed by what made them.

A store is a directory with ``manifest.json`` and shards of raw numbers. A shard counts only once
the manifest names it with its checksum, and the manifest is replaced atomically, so a killed build
goes on where it stopped. A shard's checksum is verified when it is first read.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_reft.devices import DTYPES
from lowmem_reft.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

VERSION = 1
"""Raised when the same inputs would be stored otherwise, so that old stores are built again."""

SHARD_BYTES = 2**26
FREE_BYTES = 2**28
"""Disk space that is left alone."""


class CorruptShardError(RuntimeError):
    """A shard does not hold what was written to it."""

    def __init__(self, path: Path, shard: int) -> None:
        super().__init__(f"{path} is damaged: its checksum is not the one in the manifest")
        self.shard = shard


@dataclass(frozen=True)
class Shape:
    """What is kept for one example."""

    prefix: int
    """Tokens whose keys and values are kept."""
    suffix: int
    """Tokens whose hidden vectors are kept."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes and order of everything in a store."""

    shapes: Sequence[Shape]
    """One per example."""
    hidden_size: int
    """Width of a hidden vector."""
    num_cached_layers: int
    """Blocks whose keys and values are kept."""
    num_kv_heads: int
    """Key and value heads of each."""
    head_dim: int
    """Width of each."""
    dtype: str
    """bf16, fp16 or fp32, as the base computes."""

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return DTYPES[self.dtype].itemsize

    def num_bytes(self, shape: Shape) -> int:
        """Return the bytes of one example."""
        kv = 2 * self.num_cached_layers * self.num_kv_heads * self.head_dim * shape.prefix
        return self.itemsize * (shape.suffix * self.hidden_size + kv)

    @cached_property
    def shards(self) -> list[list[int]]:
        """Examples of each shard."""
        shards: list[list[int]] = [[]]
        filled = 0
        for index, shape in enumerate(self.shapes):
            size = self.num_bytes(shape)
            if shards[-1] and filled + size > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(index)
            filled += size
        return shards

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Return (shard, offset in bytes) of each example."""
        places = [(0, 0)] * len(self.shapes)
        for shard, examples in enumerate(self.shards):
            offset = 0
            for index in examples:
                places[index] = (shard, offset)
                offset += self.num_bytes(self.shapes[index])
        return places

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.num_bytes(shape) for shape in self.shapes)


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
        self.directory = root / f"trunk-{key}"
        self.layout = layout
        self._facts = facts
        self._maps: dict[int, mmap.mmap] = {}
        self._manifest: dict[str, Any] = {"shards": {}}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from building the same store meanwhile.

        Raises:
            InputError: the directory cannot be written to.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handle = (self.directory / "lock").open("w")
        except OSError as error:
            raise InputError(
                f"reuse_dir must be a directory that can be written to, got "
                f"{str(self.directory.parent)!r}; choose another ({error.strerror})"
            ) from error
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._read_manifest()
            yield

    def _read_manifest(self) -> None:
        path = self.directory / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(manifest["shards"], dict)
            self._manifest = manifest
        except (OSError, ValueError, KeyError, AssertionError, TypeError):
            self._manifest = {**self._facts, "version": VERSION, "shards": {}}

    def missing_shards(self) -> list[int]:
        """Return the shards that are not there whole."""
        return [
            shard
            for shard in range(len(self.layout.shards))
            if str(shard) not in self._manifest["shards"]
            or not self._path(shard).is_file()
            or self._path(shard).stat().st_size != self._size(shard)
        ]

    def _size(self, shard: int) -> int:
        examples = self.layout.shards[shard]
        return sum(self.layout.num_bytes(self.layout.shapes[index]) for index in examples)

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05d}.bin"

    def check_space(self, limit_bytes: int | None) -> str | None:
        """Return why there is no room for what is missing; None if there is."""
        missing = sum(self._size(shard) for shard in self.missing_shards())
        if limit_bytes is not None and self.layout.total_bytes > limit_bytes:
            return (
                f"it would take {self.layout.total_bytes / 2**30:.2f} GiB, more than the limit of "
                f"{limit_bytes / 2**30:.2f} GiB"
            )
        parent = next(p for p in (self.directory, *self.directory.parents) if p.is_dir())
        free = shutil.disk_usage(parent).free
        if missing > free - FREE_BYTES:
            return (
                f"it would take {missing / 2**30:.2f} GiB more and the disk has "
                f"{free / 2**30:.2f} GiB free"
            )
        return None

    def write(self, shard: int, records: Sequence[Record]) -> None:
        """Write one shard; it counts from when this returns."""
        path, crc = self._path(shard), 0
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                for record in records:
                    for part in (record.hidden, record.keys, record.values):
                        content = _bytes(part)
                        crc = zlib.crc32(content, crc)
                        file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._maps.pop(shard, None)
        self._manifest["shards"][str(shard)] = crc
        manifest = self.directory / f"manifest.{os.getpid()}.tmp"
        manifest.write_text(json.dumps(self._manifest, indent=1), encoding="utf-8")
        manifest.replace(self.directory / "manifest.json")

    def forget(self, shard: int) -> None:
        """Make a shard count as missing."""
        self._manifest["shards"].pop(str(shard), None)
        self._maps.pop(shard, None)

    def read(self, index: int) -> Record:
        """Return the constants of an example, on the CPU.

        Raises:
            CorruptShardError: the shard does not hold what was written to it.
        """
        layout, shape = self.layout, self.layout.shapes[index]
        shard, offset = layout.places[index]
        if shard not in self._maps:
            self._maps[shard] = self._open(shard)
        dtype = DTYPES[layout.dtype]
        sizes = (
            (shape.suffix, layout.hidden_size),
            (layout.num_cached_layers, layout.num_kv_heads, shape.prefix, layout.head_dim),
            (layout.num_cached_layers, layout.num_kv_heads, shape.prefix, layout.head_dim),
        )
        parts = []
        for size in sizes:
            count = 1
            for length in size:
                count *= length
            if count:
                flat = torch.frombuffer(self._maps[shard], dtype=dtype, count=count, offset=offset)
                parts.append(flat.view(size))
            else:
                parts.append(torch.empty(size, dtype=dtype))
            offset += count * layout.itemsize
        return Record(*parts)

    def _open(self, shard: int) -> mmap.mmap:
        path = self._path(shard)
        try:
            with path.open("rb") as file:
                # Copy-on-write: torch wants writable memory, and the file stays as it is.
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CorruptShardError(path, shard) from error
        whole = len(content) == self._size(shard)
        if not whole or zlib.crc32(content) != self._manifest["shards"].get(str(shard)):
            content.close()
            raise CorruptShardError(path, shard)
        return content


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
