"""From the options of a comparison to its cells: what each trains and scores, and its key."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.sources import Sources
from lowmem_reft.errors import InputError
from lowmem_reft.methods.entries import MethodSpec, resolve_learning_rate
from lowmem_reft.methods.table import find_method
from lowmem_reft.options import (
    CompareOptions,
    DataOptions,
    EvaluateOptions,
    HeldOutOptions,
    MemoryOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    ScoringOptions,
    TrainOptions,
)
from lowmem_reft.options.values import QUANTIZED


def build_cells(
    options: CompareOptions, specs: Sequence[MethodSpec], seeds: Sequence[int], sources: Sources
) -> list[Cell]:
    """The untuned base once per storage, then every method with every seed, on one task.

    A base under an untrained classification head says nothing, so it has no row there.

    Raises:
        InputError: Two methods are the same, or would share a directory.
    """
    storages = {spec.storage: spec.label for spec in reversed(specs)}
    cells = [
        _base_cell(options, sources, storage, storages[storage])
        for storage in dict.fromkeys(spec.storage for spec in specs)
        if options.task_type == "CAUSAL_LM"
    ]
    cells += [_method_cell(options, sources, spec, seed) for spec in specs for seed in seeds]
    if len({cell.directory for cell in cells}) < len(cells):
        raise InputError(
            f"methods must be different, got {options.methods!r}; drop the one that is there twice"
        )
    return cells


def command_line(options: CompareOptions, methods: str, seeds: int | str) -> str:
    """The command that runs one cell, or several, again (and scores the base beside it)."""
    words = ["lowmem-reft", "compare", "--methods", methods, "--seeds", str(seeds)]
    apart = {"methods", "seeds", "output_dir", "workers", "json", "quiet"}
    apart |= {"optim", "memory", "reuse", "scoring", "equal", "budget_reference"}
    groups = (
        (options, CompareOptions()),
        (options.memory, MemoryOptions()),
        (options.optim, OptimOptions()),
        (options.reuse, CompareOptions().reuse),
        (options.scoring, ScoringOptions()),
    )
    for group, defaults in groups:
        for field in fields(group):
            value = getattr(group, field.name)
            if (group is not options or field.name not in apart) and value != getattr(
                defaults, field.name
            ):
                flag = f"--{field.name.replace('_', '-')}"
                words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


def _base_cell(options: CompareOptions, sources: Sources, storage: str, method: str) -> Cell:
    label = f"base[storage={storage}]"
    directory = _cell_directory(options, sources, label, 0)
    evaluate = _evaluate_options(options, sources, storage, directory, adapter=None)
    evaluate = replace(evaluate, reuse=ReuseOptions(reuse="off"))
    command = _command(options, sources, method, 0)
    return Cell(
        directory=directory,
        train=None,
        evaluate=evaluate,
        record=_record(options, sources, label, 0, command, None, evaluate),
    )


def _method_cell(options: CompareOptions, sources: Sources, spec: MethodSpec, seed: int) -> Cell:
    directory = _cell_directory(options, sources, spec.label, seed)
    training = directory / "train"
    if options.train_task is not None:  # one adapter for all tasks
        training = options.output_dir / "trained" / directory.name
    evaluate = _evaluate_options(
        options, sources, spec.storage, directory, adapter=training / "adapter"
    )
    train = TrainOptions(
        model=evaluate.model,
        data=replace(
            evaluate.data,
            data=sources.train,
            split=options.split,
            template=sources.train_template,
            limit=options.limit,
        ),
        held_out=HeldOutOptions(
            validation_data=sources.validation,
            validation_split=options.validation_split,
            validation_limit=options.validation_limit,
        ),
        scoring=sources.train_scoring,
        method=spec.options,
        optim=resolve_learning_rate(spec.options, replace(options.optim, **spec.optim_overrides)),
        memory=options.memory,
        reuse=replace(evaluate.reuse, dequantize_upper=options.reuse.dequantize_upper),
        run=RunOptions(output_dir=training, seed=seed, quiet=True),
    )
    command = _command(options, sources, spec.label, seed)
    return Cell(
        directory=directory,
        train=train,
        evaluate=evaluate,
        record=_record(options, sources, spec.label, seed, command, train, evaluate),
    )


def _evaluate_options(
    options: CompareOptions, sources: Sources, storage: Any, directory: Path, adapter: Path | None
) -> EvaluateOptions:
    return EvaluateOptions(
        model=ModelOptions(
            model=sources.model,
            storage=storage,
            # 16- and 32-bit weights are computed in their own dtype.
            compute_dtype=options.compute_dtype if storage in QUANTIZED else "auto",
            device=options.device,
            task_type=options.task_type,
        ),
        data=DataOptions(
            data=sources.evaluate,
            split=options.eval_split,
            template=sources.template,
            max_length=options.max_length,
            limit=options.eval_limit,
        ),
        adapter=adapter,
        scoring=sources.scoring,
        # Cells share their stores: another seed or rank on the same layers builds nothing.
        reuse=replace(
            options.reuse,
            reuse_dir=options.reuse.reuse_dir or options.output_dir / "reuse",
            dequantize_upper="auto",  # it is for training
        ),
        predictions=directory / "predictions.jsonl",
        quiet=True,
    )


def _method_config(train: TrainOptions) -> dict[str, Any]:
    """The method's options with the defaults of the method table: a new default is a new cell."""
    method = find_method(train.method.method)
    given = {name: value for name, value in asdict(train.method).items() if value is not None}
    return {**method.fixed, **method.defaults, **given}


def _record(
    options: CompareOptions,
    sources: Sources,
    label: str,
    seed: int,
    command: str,
    train: TrainOptions | None,
    evaluate: EvaluateOptions,
) -> Result:
    """What is known before the run; ``config`` names its inputs by digest: valid on any machine."""
    config: dict[str, Any] = {
        "model": {**asdict(evaluate.model), "model": sources.model_digest},
        "eval_data": {**asdict(evaluate.data), "data": sources.evaluate_digest},
        "scoring": {**asdict(evaluate.scoring), "batch_size": evaluate.batch_size},
    }
    if train is not None:
        config["data"] = {**asdict(train.data), "data": sources.train_digest}
        config["method"] = _method_config(train)
        config["optim"] = asdict(train.optim)
        config["memory"] = asdict(train.memory)
        config["validation_data"] = {
            **asdict(train.held_out),
            "validation_data": sources.validation_digest,
        }
        config["validation_scoring"] = asdict(train.scoring)
        config["seed"] = seed
    canonical = json.dumps(config, sort_keys=True)
    return {
        "method": label,
        "task": sources.task,
        "seed": seed,
        "storage": evaluate.model.storage,
        "model": sources.model_name,
        "command": command,
        "predictions": os.path.relpath(evaluate.predictions or "", options.output_dir),
        "config": config,
        "key": hashlib.sha256(canonical.encode()).hexdigest(),
    }


def _command(options: CompareOptions, sources: Sources, method: str, seed: int) -> str:
    tasks = None if options.tasks is None else sources.task
    return command_line(replace(options, tasks=tasks), method, seed)


def _cell_directory(options: CompareOptions, sources: Sources, label: str, seed: int) -> Path:
    slug = re.sub(r"[^A-Za-z0-9.+=]+", "-", label).strip("-")
    folder = "" if options.tasks is None else sources.task
    return options.output_dir / "cells" / folder / f"{slug}-seed{seed}"
