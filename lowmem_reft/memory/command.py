"""What ``plan --fit`` found, as the options and the command line of ``train``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_reft.memory.shapes import HUB_IDS
from lowmem_reft.options import (
    DataOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    TrainOptions,
    written,
)

if TYPE_CHECKING:
    from lowmem_reft.memory.search import Candidate
    from lowmem_reft.options import PlanOptions

_ALWAYS = ("method", "storage", "max_length", "batch_size", "gradient_accumulation")
"""What is written though it may be the default: it is what was planned."""


def train_options(options: PlanOptions, chosen: Candidate) -> TrainOptions:
    """Return the options of the training that was planned: what was given, and what was chosen.

    Where no rows were given, their file is to be filled in.
    """
    shape, rows, setting = options.shape, options.rows, chosen.setting
    max_length = chosen.lengths.seq_len if not rows.data else rows.max_length
    return TrainOptions(
        model=ModelOptions(
            model=train_name(shape.model),
            storage=setting.storage,
            compute_dtype=shape.compute_dtype,
            device="cpu" if shape.device == "cpu" else "auto",
            task_type=None if shape.task_type == "CAUSAL_LM" else shape.task_type,
        ),
        data=DataOptions(
            data=rows.data or "FILE.jsonl",
            split=rows.split,
            template=rows.template,
            max_length=max_length,
            limit=rows.limit,
        ),
        prompts=rows.prompts,
        method=setting.method,
        optim=OptimOptions(
            optim=setting.optim,
            batch_size=chosen.lengths.batch_size,
            gradient_accumulation=chosen.lengths.gradient_accumulation,
        ),
        memory=written.changed(setting.memory, memory_gib=options.memory.memory_gib),
        reuse=_reuse(options, setting.resident),
        run=RunOptions(output_dir=Path("DIR")),
    )


def train_command(options: PlanOptions, chosen: Candidate) -> str:
    """Return the command line of the training that was planned."""
    train = train_options(options, chosen)
    given = written.given(train)
    words = ["lowmem-reft", "train"]
    for name, value in written.values(train).items():
        if value is not None and (name in given or name in _ALWAYS):
            flag = written.flag(name)
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def train_name(model: str) -> str:
    """Return what ``train`` calls a model: its hub id, or the directory of its config.json."""
    path = Path(model)
    if path.name == "config.json" and path.is_file():
        return str(path.parent)
    return HUB_IDS.get(model.lower(), model)


def _reuse(options: PlanOptions, resident: str) -> ReuseOptions:
    store = options.store
    if resident == "all":
        return ReuseOptions(reuse="auto" if store.reuse == "off" else store.reuse)
    return ReuseOptions(
        reuse=store.reuse if store.resident == "upper" else "trunk", resident="upper"
    )
