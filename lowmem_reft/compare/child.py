"""The process of a cell: ``python -m lowmem_reft.compare.child CELL.json`` trains and scores it.

It leaves ``result.json`` beside that file whether the run succeeds or raises. The process is the
unit of isolation: its peak memory is the method's own, and one that is killed takes nothing else
with it. Its log says how far it is. What a killed process cannot write, the parent writes
(``engines/launch.py``).
"""

from __future__ import annotations

import fcntl
import shutil
import sys
import time
from pathlib import Path

from lowmem_reft.compare.cell import EMPTY_RESULT, TRAINED_FILE, Cell, Result, training_key
from lowmem_reft.compare.engines.launch import leave_result
from lowmem_reft.machine import own_modules, provenance
from lowmem_reft.machine.devices import device_name
from lowmem_reft.machine.files import open_itself, parse_json, write_json
from lowmem_reft.machine.progress import say_in_lines
from lowmem_reft.options import TrainOptions
from lowmem_reft.runs.checkpoints import OWN
from lowmem_reft.runs.evaluate import check_rows_of, run_evaluation
from lowmem_reft.runs.train import run_training


def run_cell(cell: Cell) -> Result:
    """Train (unless the base itself is scored), score, and return the measurements.

    Memory and time are those of the training; the base's row has none. ``adapter_bytes`` counts the
    weight file only (not the model card), ``peak_bytes`` live storages on a CPU and allocated bytes
    on CUDA.
    """
    start = time.perf_counter()
    own_modules.load()
    trained: Result = {"num_trainable_params": 0, "trainable_percent": 0.0, "adapter_bytes": 0}
    if cell.train is not None:
        check_rows_of(cell.evaluate)  # a wrong file is not to cost the training
        trained = _train_once(cell.train, training_key(cell))
    scored = run_evaluation(cell.evaluate)
    measured = {
        **trained,
        "metric": scored["metric"],
        "value": scored["value"],
        "extra": scored.get("extra"),
        "loss": scored.get("loss"),
        "few_shot": scored.get("few_shot"),
        "general_loss": scored.get("general_loss"),
        "num_examples": scored["num_examples"],
        "wall_time_s": time.perf_counter() - start,
        "device": device_name(cell.evaluate.model.device),
        "commit": provenance.commit(),
        "versions": provenance.versions(),
    }
    known = {name: value for name, value in measured.items() if name in EMPTY_RESULT}
    return {**EMPTY_RESULT, **known, **cell.record}


def _train_once(options: TrainOptions, key: str) -> Result:
    """Train, unless a cell of another task, or of another scoring, has left the same adapter."""
    directory = options.run.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    done = directory / TRAINED_FILE
    with open_itself(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.is_file():
            known = parse_json(done.read_text(encoding="utf-8"))
            if known["key"] == key:
                return dict(known["result"])
            done.unlink()
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)  # a cell runs from the start or not at all
        trained = dict(run_training(options))
        weights = Path(trained["adapter_dir"]).glob("*.safetensors")
        trained["adapter_bytes"] = sum(file.stat().st_size for file in weights)
        for made in (*directory.glob("checkpoint-*"), directory / OWN):
            shutil.rmtree(made)
        write_json(done, {"key": key, "result": trained})
        return trained


if __name__ == "__main__":
    say_in_lines()
    sys.exit(leave_result(Path(sys.argv[1]), run_cell))
