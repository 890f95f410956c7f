"""What a Ray task does: run one cell in a process and hand its files over as they grow.

The cell runs in a directory that is made for it on its node, with copies of the rows that the
driver sent, so that driver and nodes need no file system in common.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_reft.compare.engines.launch import LOG_FILE, cause_of_death, join_child, start_child
from lowmem_reft.machine import own_modules
from lowmem_reft.machine.files import parse_json, write_json

_FOLLOWED = (LOG_FILE, "train/epochs.jsonl")
"""Handed over while the cell runs: for people, and for a sweep that may stop it."""

_POLL_S = 0.2
_STOP_S = 3.0
_PART_BYTES = 2**24


class Part(NamedTuple):
    """A part of a file, to be appended to what was handed over of it before."""

    path: str
    """Relative to the cell's directory."""
    data: bytes


class Input(NamedTuple):
    """A file of the driver that the cell reads."""

    path: str
    """As the cell's options name it."""
    data: bytes


HANDED_OVER = ("OMP_NUM_THREADS", own_modules.VARIABLE)
"""Ray has a number of threads of its own, which would change the order of sums; and modules of the
user's, which the nodes must have too."""


def run_on_node(
    content: dict[str, Any],
    directory: str,
    arguments: Sequence[str],
    variables: dict[str, str | None],
    *inputs: Input,
) -> Iterator[Part | str]:
    """Run a cell, yield the parts of its files, and last how its process ended.

    Args:
        content: ``cell.json``.
        directory: The cell's directory on the driver, where its options point to.
        arguments: Of Python, which is the node's own: what runs one cell.
        variables: ``HANDED_OVER`` of the driver's environment.
        inputs: Files that the options name.
    """
    with tempfile.TemporaryDirectory(prefix="lowmem-reft-") as temporary:
        here = Path(temporary, "cell")
        moved = {directory: str(here)}
        for number, (name, data) in enumerate(inputs):
            copy = Path(temporary, "inputs", str(number), Path(name).name)
            copy.parent.mkdir(parents=True)
            copy.write_bytes(data)
            moved[name] = str(copy)
        options = {name: _moved(content[name], moved) for name in ("train", "evaluate")}
        path = write_json(here / "cell.json", {**content, **options})
        environment = {name: value for name, value in os.environ.items() if name not in variables}
        environment |= {name: value for name, value in variables.items() if value is not None}
        handed_over: dict[str, int] = {}
        process = start_child([sys.executable, *arguments], path, environment)
        try:
            while process.poll() is None:
                time.sleep(_POLL_S)
                for name in _FOLLOWED:
                    yield from _new_parts(here, name, handed_over)
        finally:
            if process.poll() is None:  # the task is cancelled
                process.terminate()
                join_child(process, _STOP_S)
        # The result last: where it is, the rest is.
        for name in sorted(_kept_files(here), key="result.json".__eq__):
            if name not in _FOLLOWED and name.endswith((".json", ".jsonl")):
                _move_back(here / name, moved)
            yield from _new_parts(here, name, handed_over)
        yield cause_of_death(process.returncode, here)


def _moved(content: Any, moved: dict[str, str]) -> Any:
    """The options with the driver's paths, and what is below them, replaced by those here."""
    if isinstance(content, dict):
        return {name: _moved(value, moved) for name, value in content.items()}
    if isinstance(content, str):
        for old, new in moved.items():
            if content == old or content.startswith(old + os.sep):
                return new + content[len(old) :]
    return content


def _move_back(path: Path, moved: dict[str, str]) -> None:
    """Name the driver's paths in a file again: where a row is from, what an error is about."""
    text = path.read_text(encoding="utf-8")
    for old, new in moved.items():
        text = text.replace(new, json.dumps(old)[1:-1])
    path.write_text(text, encoding="utf-8")


def _kept_files(directory: Path) -> Iterator[str]:
    for path in directory.rglob("*"):
        name = path.relative_to(directory)
        checkpoint = any(part.startswith("checkpoint-") for part in name.parts)
        if path.is_file() and not checkpoint and str(name) != "cell.json":
            yield str(name)


def _new_parts(directory: Path, name: str, handed_over: dict[str, int]) -> Iterator[Part]:
    """What a file has gained since it was looked at before, in parts that fit into memory."""
    path = directory / name
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(handed_over.get(name, 0))
        while data := file.read(_PART_BYTES):
            handed_over[name] = file.tell()
            yield Part(name, data)


def data_files(content: dict[str, Any]) -> list[str]:
    """The files of rows and text that a cell's options name; ids of data sets are no files."""
    train, evaluate = content["train"] or {}, content["evaluate"]
    held_out = train.get("held_out") or {}
    named = [
        evaluate["data"]["data"],
        evaluate["prompts"].get("examples"),
        (train.get("data") or {}).get("data"),
        held_out.get("eval_data"),
        held_out.get("validation_data"),
        (evaluate.get("beside") or {}).get("forgetting"),
    ]
    return sorted({path for path in named if path and Path(path).is_file()})


def read_content(path: Path) -> dict[str, Any]:
    """Read ``cell.json`` with paths that do not depend on the current directory."""
    content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
    train, evaluate = content["train"], content["evaluate"]
    for options in filter(None, (train, evaluate)):
        model, reuse = options["model"], options["reuse"]
        if Path(model["model"]).is_dir():
            model["model"] = os.path.abspath(model["model"])
        if reuse["reuse_dir"]:
            reuse["reuse_dir"] = os.path.abspath(reuse["reuse_dir"])
    for name in ("adapter", "predictions"):
        if evaluate[name]:
            evaluate[name] = os.path.abspath(evaluate[name])
    if train:
        train["run"]["output_dir"] = os.path.abspath(train["run"]["output_dir"])
    return content
