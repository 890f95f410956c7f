"""The comparison: every method with every seed, trained and scored, memory beside accuracy.

``run_comparison`` turns the options into cells (``cell.py``), runs each in its own process
(``schedule.py``) and writes ``results.json``, ``results.csv`` and the report (``report/``). This
module loads no model.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft.compare.cell import Cell, Result
from lowmem_reft.compare.engines.child import CHILD_COMMAND
from lowmem_reft.compare.queue import run_cells
from lowmem_reft.compare.sources import Sources, find_all_sources
from lowmem_reft.errors import InputError
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

if TYPE_CHECKING:
    from lowmem_reft.methods.entries import MethodSpec

DEFAULT_METHODS = "loreft,loreft[storage=bf16],lora,qlora"
EMBEDDED_METHODS = (
    "loreft[rank=8,lr=4e-3],loreft[rank=8,lr=4e-3,storage=bf16],lora[rank=8,lr=2e-3],"
    "qlora[rank=8,lr=2e-3]"
)


def run_comparison(
    options: CompareOptions, *, child_command: Sequence[str] = CHILD_COMMAND
) -> dict[str, Any]:
    """Run the matrix task x method x seed, the untuned base first, and write the report.

    Args:
        options: What to compare; finished cells in ``options.output_dir`` are not run again.
        child_command: Replaces the process that runs a cell.

    Returns:
        ``output_dir``, ``results``, ``csv``, ``report`` (paths), ``num_cells``, ``num_failed`` and
        ``rows``: the table's rows, each a method with means over its seeds.

    Raises:
        InputError: The methods, seeds, model or data are wrong.
    """
    from lowmem_reft.compare.report import write_results
    from lowmem_reft.compare.report.console import Progress, print_table
    from lowmem_reft.compare.report.table import aggregate
    from lowmem_reft.methods.entries import expand_methods, parse_methods

    every = options.methods == "all"
    embedded = options.model is None and options.data is None
    methods = expand_methods(options.methods or default_methods(options), embedded=embedded)
    reference = options.budget_reference and expand_methods(
        options.budget_reference, embedded=embedded
    )
    options = replace(options, methods=methods, budget_reference=reference)
    specs, seeds = parse_methods(options.methods or ""), parse_seeds(options.seeds)
    cells = [
        cell
        for sources in find_all_sources(options)
        for cell in _cells_of_task(options, specs, seeds, sources, child_command)
    ]
    with Progress(len(cells), quiet=options.quiet) as progress:
        results = run_cells(
            cells, observer=progress, workers=options.workers, child_command=child_command
        )
    written = write_results(results, options.output_dir)
    rows = aggregate(results)
    if not options.quiet:
        print_table(rows)
    return {
        **written,
        "num_cells": len(results),
        "num_failed": sum(
            # Of all methods, some are refused for a reason that their rows state.
            result["error"] is not None and not (every and is_refused(result))
            for result in results
        ),
        "rows": [asdict(row) for row in rows],
    }


def _cells_of_task(
    options: CompareOptions,
    specs: Sequence[MethodSpec],
    seeds: Sequence[int],
    sources: Sources,
    child_command: Sequence[str],
) -> list[Cell]:
    """The cells of one task, with equal budgets if they are asked for."""
    if options.equal is None:
        return build_cells(options, specs, seeds, sources)
    from lowmem_reft.compare.budget import equalize
    from lowmem_reft.compare.report.console import Progress

    def cells_of(chosen: CompareOptions, own: Sequence[MethodSpec]) -> list[Cell]:
        return build_cells(chosen, own, seeds[:1], sources)

    def run(timed: Sequence[Cell]) -> list[Result]:
        with Progress(len(timed), quiet=options.quiet) as progress:
            return run_cells(timed, observer=progress, child_command=child_command)

    equal = equalize(options, specs, cells_of=cells_of, run=run)
    if not options.quiet:
        for label, note in equal.notes.items():
            print(f"{label}: {note}", file=sys.stderr)
    cells = build_cells(equal.options, equal.specs, seeds, sources)
    for cell in cells:
        cell.record["budget"] = equal.notes.get(cell.record["method"])
    return cells


def is_refused(result: Result) -> bool:
    """Whether a cell's method was refused as bad input, and did not fail."""
    return str(result["error"]).startswith(f"{InputError.__name__}:")


def default_methods(options: CompareOptions) -> str:
    """The methods when none are named; the tiny model wants higher learning rates."""
    embedded = options.model is None and options.data is None
    return EMBEDDED_METHODS if embedded else DEFAULT_METHODS


def parse_seeds(text: str) -> list[int]:
    """``"0,1,2"`` as numbers.

    Raises:
        InputError: Something is no number, or is there twice, or there is nothing.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise InputError(
            f"seeds must be different non-negative integers, got {text!r}; write for example 0,1,2"
        )
    return [int(word) for word in words]


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
    from lowmem_reft.methods.entries import resolve_learning_rate

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
    from lowmem_reft.methods.table import find_method

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
