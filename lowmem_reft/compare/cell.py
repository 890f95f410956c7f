"""One cell of a comparison: one method with one seed. What is to be done, and what came out.

This is data alone; ``child.py`` runs it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from lowmem_reft.machine.files import fits, parse_json, write_json
from lowmem_reft.options import EvaluateOptions, TrainOptions, written

Result = dict[str, Any]
"""The content of a ``result.json``: the fields of ``EMPTY_RESULT`` and those of ``Cell.record``."""

EMPTY_RESULT: Result = {
    "method": None,
    "task": None,
    "seed": None,
    "metric": None,
    "value": None,
    "extra": None,
    "num_trainable_params": None,
    "trainable_percent": None,
    "adapter_bytes": None,
    "peak_bytes": None,
    "breakdown_bytes": None,
    "reserved_bytes": None,
    "rss_bytes": None,
    "step_time_s": None,
    "build_time_s": None,
    "tokens_per_s": None,
    "real_percent": None,
    "reuse": None,
    "best_epoch": None,
    "validation_value": None,
    "validation": None,
    "train_loss": None,
    "loss": None,
    "general_loss": None,
    "forgetting": None,
    "reference_value": None,
    "time_to_reference_s": None,
    "steps_to_reference": None,
    "tokens_to_reference": None,
    "num_examples": None,
    "num_steps": None,
    "train_time_s": None,
    "wall_time_s": None,
    "few_shot": None,
    "examples": None,
    "lr_search": None,
    "verdict": None,
    "error": None,
    "storage": None,
    "model": None,
    "command": None,
    "budget": None,
    "predictions": None,
    "device": None,
    "commit": None,
    "versions": None,
    "key": None,
    "config": None,
    "loss_history": None,
}
"""Every field of a result, in the order of the columns; what was not measured stays None."""

_TYPES: dict[str, Any] = {
    **dict.fromkeys(("method", "task"), str),
    "seed": int,
    **dict.fromkeys(("metric", "reuse", "error", "storage", "model", "command"), str | None),
    **dict.fromkeys(("budget", "predictions", "device", "commit", "key"), str | None),
    **dict.fromkeys(("extra", "breakdown_bytes"), dict[str, float | None] | None),
    "versions": dict[str, str | None] | None,
    "few_shot": dict[str, Any] | None,
    "examples": list[str] | None,
    "lr_search": list[dict[str, str | float | bool | None]] | None,
    "verdict": list[dict[str, str | None]] | None,
    "config": dict[str, Any] | None,
    "validation": list[dict[str, str | float | None]] | None,
    "loss_history": list[list[float | None]] | None,
}
"""Of the fields of a result; the others are numbers, or None."""

TRAINED_FILE = "trained.json"
"""Key and result of a training that has ended, in its directory."""

_MAX_ERROR_CHARACTERS = 500


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What one process does."""

    directory: Path
    """Where cell.json, log.txt, predictions.jsonl, train/ and result.json go."""
    train: TrainOptions | None
    """The training run; None scores the base as it is."""
    evaluate: EvaluateOptions
    """The scoring; its adapter is the one that ``train`` leaves."""
    record: Result
    """What is known before the run: method, task, seed, storage, model, command, config and key."""

    @property
    def name(self) -> str:
        """The cell in words, for progress and messages."""
        return f"{self.record['method']} seed {self.record['seed']}"

    @property
    def result_path(self) -> Path:
        """The file that says that the cell is finished, or why it failed."""
        return self.directory / "result.json"


def what_is_wrong(result: Any) -> str | None:
    """Say what of a result from a file is not as it is written; None if all is."""
    if not isinstance(result, dict):
        return f"a cell must be an object, got {shortened(result)}"
    for name, value in {**dict.fromkeys(("method", "task", "seed")), **result}.items():
        if name in EMPTY_RESULT and not fits(value, _TYPES.get(name, float | None)):
            return f"{name} must be {_words(name)}, got {shortened(value)}"
    if not all(map(_is_epoch, result.get("validation") or ())):
        return f"validation must have epochs and values, got {shortened(result['validation'])}"
    if not all({"lr", "value", "chosen"} <= line.keys() for line in result.get("lr_search") or ()):
        return f"lr_search must have lr, value and chosen, got {shortened(result['lr_search'])}"
    return None


def _is_epoch(line: dict[str, Any]) -> bool:
    numbers = [value for name, value in line.items() if name != "metric"]
    known = fits(line.get("epoch"), float) and "value" in line
    return known and all(fits(number, float | None) for number in numbers)


def _words(name: str) -> str:
    hint = _TYPES.get(name, "a number or null")
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


def write_cell(cell: Cell) -> Path:
    """Write ``cell.json`` into the cell's directory and return its path."""
    content = {
        "train": asdict(cell.train) if cell.train else None,
        "evaluate": asdict(cell.evaluate),
        "record": cell.record,
    }
    return write_json(cell.directory / "cell.json", content)


def read_cell(path: Path) -> Cell:
    """Read what ``write_cell`` wrote."""
    content = parse_json(path.read_text(encoding="utf-8"))
    return Cell(
        directory=path.parent,
        train=written.build(TrainOptions, **content["train"]) if content["train"] else None,
        evaluate=written.build(EvaluateOptions, **content["evaluate"]),
        record=content["record"],
    )


def training_key(cell: Cell) -> str:
    """Digest of all that the adapter depends on: the cell's config without what it is scored on."""
    config = {
        name: value
        for name, value in cell.record["config"].items()
        if name not in ("eval_data", "scoring", "forgetting")
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def cell_files(directory: Path) -> list[Path]:
    """The ``cell.json`` of every cell that was begun in the directory of a comparison, by path."""
    # Those of named tasks are in a folder for each.
    patterns = ("cells/*/cell.json", "cells/*/*/cell.json")
    return sorted(path for pattern in patterns for path in directory.glob(pattern))


def failed_result(cell: Cell, error: str, wall_time_s: float) -> Result:
    """The row of a cell that did not finish: what was known before, and the error on one line."""
    error = " ".join(error.split())[:_MAX_ERROR_CHARACTERS]
    return {**EMPTY_RESULT, **cell.record, "wall_time_s": wall_time_s, "error": error}
