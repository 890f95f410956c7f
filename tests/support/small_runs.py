"""A training of four steps that tests of runs begin with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowmem_reft.options import (
    DataOptions,
    HeldOutOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    TrainOptions,
)

ROWS = [
    {"prompt": f"is the {noun} good or bad? label:", "choices": ["good", "bad"], "answer": answer}
    for noun, answer in [("cat", 0), ("dog", 1), ("fox", 0), ("film", 1)]
]


def small_run(model: Path, directory: Path, *, validated: bool = False) -> TrainOptions:
    """Two epochs of two steps at one learning rate; checkpoints after each."""
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TrainOptions(
        model=ModelOptions(model=str(model), storage="fp32", compute_dtype="fp32", device="cpu"),
        data=DataOptions(data=str(data)),
        held_out=HeldOutOptions(validation_data=str(data) if validated else None),
        method=MethodOptions(rank=2, positions="l1"),
        optim=OptimOptions(epochs=2, batch_size=2, lr=1e-2, warmup_ratio=0, schedule="constant"),
        run=RunOptions(output_dir=directory / "run", quiet=True, logging_steps=1, save_steps=1),
    )


def with_run(options: TrainOptions, **changes: Any) -> TrainOptions:
    """Return options with others of the group ``run``."""
    return replace(options, run=replace(options.run, **changes))


def with_optim(options: TrainOptions, **changes: Any) -> TrainOptions:
    """Return options with others of the group ``optim``."""
    return replace(options, optim=replace(options.optim, **changes))


def adapter_of(options: TrainOptions) -> bytes:
    """Return the weights that a run has ended in."""
    return (options.run.output_dir / "adapter" / "adapter_model.safetensors").read_bytes()
