"""Checkpoints of a run: each is whole or absent, and holds all that its run goes on from.

The Trainer fills a directory that nobody looks into. It gets its name once all of its files are on
the disk and ``whole.json`` names them with their sizes and checksums; only then does the checkpoint
before it go. So a run that is killed at any moment has one to go on from, and one that is damaged
later is noticed. Beside what the Trainer saves a checkpoint holds the epochs that were scored by
then, the weights of the best of them, and the losses that no report has shown yet: what a run that
goes on must not take from anywhere else.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json, sync, sync_tree

NOTE = "whole.json"
BEST = "best.safetensors"
EPOCHS_FILE = "epochs.jsonl"
OWN = ".lowmem_reft"
"""The directory in a run's one where things are made that are not whole yet."""

_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK_BYTES = 2**24


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole."""

    directory: Path
    """Where it is."""
    note: dict[str, Any]
    """What ``whole.json`` says: run, step, max_steps, epochs, losses, spent, files."""

    @property
    def step(self) -> int:
        """The optimizer steps that were taken before it."""
        return int(self.note["step"])

    @property
    def best_weights(self) -> Path:
        """The weights of the best of its epochs; no file if there was none."""
        return self.directory / BEST


def named_so(directory: Path) -> list[Path]:
    """Return everything in a directory that has a checkpoint's name, the last step first."""
    found = [path for path in directory.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.rpartition("-")[2])


def is_ours(path: Path) -> bool:
    """Whether a run wrote a checkpoint, whole or not any more; an empty directory is nobody's."""
    if path.is_symlink() or not path.is_dir():
        return False
    return _read_note(path) is not None or not any(path.iterdir())


def is_half(path: Path) -> bool:
    """Whether something is a directory that a Trainer has begun to write a checkpoint to."""
    return path.is_dir() and not path.is_symlink() and not (path / "trainer_state.json").exists()


def last_whole(directory: Path, run: str | None) -> tuple[Checkpoint | None, list[str]]:
    """Return the last whole checkpoint of a run, and why later ones are stepped over.

    Args:
        directory: The run's.
        run: The run's id; None takes those of any.
    """
    why: list[str] = []
    for path in named_so(directory):
        note = _read_note(path) if is_ours(path) else None
        if note is not None and run not in (None, note["run"]):
            continue  # of a run that this one has replaced
        damage = f"{NOTE} is missing" if note is None else _damage(path, note)
        if damage is None and note is not None:
            return Checkpoint(path, note), why
        why.append(f"{path.name} is not whole ({damage})")
    return None, why


def put_in_place(made: Path, directory: Path, note: dict[str, Any]) -> None:
    """Give a checkpoint that the Trainer has filled its name in the run's directory.

    One of the same step that is whole stays: it is the same but for the time it was saved at.
    Older ones of runs go afterwards.
    """
    files = {
        str(path.relative_to(made)): [path.stat().st_size, _checksum(path)]
        for path in sorted(made.rglob("*"))
        if path.is_file()
    }
    note = {**note, "files": files}
    note["checksum"] = _checksum_of(note)
    (made / NOTE).write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
    sync_tree(made)
    target = directory / made.name
    there = _read_note(target)
    if there is not None and there["run"] == note["run"] and _damage(target, there) is None:
        shutil.rmtree(made)
    else:
        if os.path.lexists(target):
            _set_aside(target)
        made.rename(target)
        sync(directory)
    for path in named_so(directory):
        if path != target and is_ours(path):
            remove(path)


def remove(path: Path) -> None:
    """Delete a checkpoint of ours; it has lost its name before it loses a file."""
    gone = path.parent / OWN / f"gone-{path.name}"
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    shutil.rmtree(gone)


def _set_aside(path: Path) -> None:
    """Take the name from what is no whole checkpoint; what no run wrote is kept."""
    if is_ours(path):
        remove(path)
        return
    if not is_half(path):
        raise InputError(
            f"output_dir must not hold {path.name}, which this run did not write, got "
            f"{str(path)!r}; move it, then add --resume"
        )
    number = 1
    while (other := path.with_name(f"{path.name}.half-{number}")).exists():
        number += 1
    path.rename(other)


def _read_note(path: Path) -> dict[str, Any] | None:
    try:
        note = parse_json((path / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_sound = isinstance(note, dict) and {"run", "step", "files", "epochs", "losses"} <= {*note}
    return note if is_sound else None


def _checksum_of(note: dict[str, Any]) -> int:
    """Return the checksum of a note, as it says it itself; those of earlier versions do not."""
    content = {name: value for name, value in note.items() if name != "checksum"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _damage(path: Path, note: dict[str, Any]) -> str | None:
    """Return what is wrong with a checkpoint's files; None if nothing is."""
    if note.get("checksum") not in (None, _checksum_of(note)):
        return f"{NOTE} has changed since it was written"
    for name, (size, checksum) in note["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _checksum(file) != checksum:
            return f"{name} has changed since it was written"
    return None


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
