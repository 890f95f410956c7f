"""One cell of a comparison: one method with one seed, trained and scored in its own process.

``python -m lowmem_reft.compare.cell CELL.json`` reads what to do, and leaves ``result.json`` beside
that file whether the run succeeds or raises. The process is the unit of isolation: its peak memory
is the method's own, and one that is killed takes nothing else with it. What a killed process cannot
write, the parent writes (``matrix.py``).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowmem_reft.machine.files import write_json
from lowmem_reft.options import (
    DataOptions,
    EvaluateOptions,
    HarnessOptions,
    HeldOutOptions,
    MemoryOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    ScoringOptions,
    TrainOptions,
)

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
    "reuse": None,
    "best_epoch": None,
    "validation_value": None,
    "validation": None,
    "train_loss": None,
    "loss": None,
    "num_examples": None,
    "num_steps": None,
    "train_time_s": None,
    "wall_time_s": None,
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
    content = json.loads(path.read_text(encoding="utf-8"))
    return Cell(
        directory=path.parent,
        train=_train_options(content["train"]) if content["train"] else None,
        evaluate=_evaluate_options(content["evaluate"]),
        record=content["record"],
    )


def run_cell(cell: Cell) -> Result:
    """Train (unless the base itself is scored), score, and return the measurements.

    Memory and time are those of the training; the base's row has none. ``adapter_bytes`` counts the
    weight file only (not the model card), ``peak_bytes`` live storages on a CPU and allocated bytes
    on CUDA.
    """
    from lowmem_reft.machine import provenance
    from lowmem_reft.runs.evaluate import run_evaluation

    start = time.perf_counter()
    trained: Result = {"num_trainable_params": 0, "trainable_percent": 0.0, "adapter_bytes": 0}
    if cell.train is not None:
        trained = _train_once(cell.train, _training_key(cell))
    scored = run_evaluation(cell.evaluate)
    measured = {
        **trained,
        "metric": scored["metric"],
        "value": scored["value"],
        "extra": scored.get("extra"),
        "loss": scored.get("loss"),
        "num_examples": scored["num_examples"],
        "wall_time_s": time.perf_counter() - start,
        "device": provenance.device_name(cell.evaluate.model.device),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
    }
    known = {name: value for name, value in measured.items() if name in EMPTY_RESULT}
    return {**EMPTY_RESULT, **known, **cell.record}


def _train_once(options: TrainOptions, key: str) -> Result:
    """Train, unless a cell of another task has left the adapter of the same training."""
    from lowmem_reft.runs.train import run_training

    directory = options.run.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    done = directory / "trained.json"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.is_file():
            known = json.loads(done.read_text(encoding="utf-8"))
            if known["key"] == key:
                return dict(known["result"])
            done.unlink()
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # a cell runs from the start or not at all
        trained = dict(run_training(options))
        weights = Path(trained["adapter_dir"]).glob("*.safetensors")
        trained["adapter_bytes"] = sum(file.stat().st_size for file in weights)
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        write_json(done, {"key": key, "result": trained})
        return trained


def _training_key(cell: Cell) -> str:
    """Digest of all that the adapter depends on: the cell's config without what it is scored on."""
    config = {
        name: value
        for name, value in cell.record["config"].items()
        if name not in ("eval_data", "scoring")
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def failed_result(cell: Cell, error: str, wall_time_s: float) -> Result:
    """The row of a cell that did not finish: what was known before, and the error on one line."""
    error = " ".join(error.split())[:_MAX_ERROR_CHARACTERS]
    return {**EMPTY_RESULT, **cell.record, "wall_time_s": wall_time_s, "error": error}


def main(arguments: list[str]) -> int:
    """Run the cell described in the file ``arguments[0]``; 0 if it finished, 1 if it raised."""
    cell = read_cell(Path(arguments[0]))
    start = time.perf_counter()
    try:
        result = run_cell(cell)
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        result = failed_result(cell, message, time.perf_counter() - start)
    write_json(cell.result_path, result)
    return 1 if result["error"] else 0


def _train_options(content: dict[str, Any]) -> TrainOptions:
    run = content["run"]
    return TrainOptions(
        model=ModelOptions(**content["model"]),
        data=DataOptions(**content["data"]),
        held_out=HeldOutOptions(**content["held_out"]),
        scoring=ScoringOptions(**content["scoring"]),
        method=MethodOptions(**content["method"]),
        optim=OptimOptions(**content["optim"]),
        memory=MemoryOptions(**content["memory"]),
        reuse=_reuse_options(content["reuse"]),
        run=RunOptions(**{**run, "output_dir": Path(run["output_dir"])}),
    )


def _evaluate_options(content: dict[str, Any]) -> EvaluateOptions:
    paths = {
        name: Path(content[name]) if content[name] else None for name in ("adapter", "predictions")
    }
    groups = {
        "model": ModelOptions(**content["model"]),
        "data": DataOptions(**content["data"]),
        "harness": HarnessOptions(),
        "scoring": ScoringOptions(**content["scoring"]),
        "reuse": _reuse_options(content["reuse"]),
    }
    return EvaluateOptions(**{**content, **paths, **groups})


def _reuse_options(content: dict[str, Any]) -> ReuseOptions:
    directory = content["reuse_dir"]
    return ReuseOptions(**{**content, "reuse_dir": Path(directory) if directory else None})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
