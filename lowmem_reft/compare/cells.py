"""From the options of a comparison to its cells: what each trains and scores, and its key."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lowmem_reft.compare.cell import Cell
from lowmem_reft.compare.sources import Examples, Sources
from lowmem_reft.errors import InputError
from lowmem_reft.machine import own_modules
from lowmem_reft.methods.entries import MethodSpec
from lowmem_reft.methods.table import find_method, given_options
from lowmem_reft.options import (
    BesideOptions,
    CompareOptions,
    DataOptions,
    EvaluateOptions,
    HeldOutOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    ScoredPromptOptions,
    TrainOptions,
    written,
)
from lowmem_reft.options.groups import ENOUGH_STEPS, FEWEST_EPOCHS, MOST_EPOCHS
from lowmem_reft.options.values import QUANTIZED

_NOT_OF_A_CELL = {
    *("methods", "seeds", "equal", "budget_reference", "lr_search", "dry_run"),
    *("output_dir", "workers", "json", "quiet"),
}
"""Options that a cell's command does not repeat, or says in another way."""

_PATHS = ("model", "data", "examples", "forgetting")


def build_cells(
    options: CompareOptions,
    specs: Sequence[MethodSpec],
    seeds: Sequence[int],
    sources: Sources,
    *,
    folder: str = "cells",
) -> list[Cell]:
    """The untuned base once per storage, then every method with every seed, on one task.

    With ``--few-shot``, the base with examples before its prompts stands between them, for every
    storage and seed: each seed draws its own. A base under an untrained classification head says
    nothing, so it has no row there. The cells are in ``folder`` of the output directory.

    Raises:
        InputError: Two methods are the same, or would share a directory.
    """
    maker = _Maker(options, sources, folder)
    storages = list(dict.fromkeys(spec.storage for spec in specs))
    cells = []
    if options.base.task_type == "CAUSAL_LM":
        cells = [maker.base(storage) for storage in storages]
        if sources.examples:
            cells += [maker.base(storage, seed) for storage in storages for seed in seeds]
    cells += [maker.tuned(spec, seed) for spec in specs for seed in seeds]
    if len({cell.directory for cell in cells}) < len(cells):
        raise InputError(
            f"methods must be different, got {options.matrix.methods!r}; drop the one that is "
            "there twice"
        )
    return cells


def command_line(options: CompareOptions, methods: str, seeds: int | str) -> str:
    """The command that trains one cell, or several, again (and scores the base beside it)."""
    start = ["lowmem-reft", "compare", "--methods", methods, "--seeds", str(seeds)]
    return shlex.join([*start, *written.flags(options, without=_NOT_OF_A_CELL)])


def scoring_command(evaluate: EvaluateOptions) -> str:
    """The command that scores a base as its cell does; files below this directory by that path."""

    def text(name: str, value: Any) -> str:
        path, here = Path(str(value)), Path.cwd()
        is_below = name in _PATHS and path.is_absolute() and path.is_relative_to(here)
        return str(path.relative_to(here)) if is_below else str(value)

    flags = written.flags(evaluate, without=("predictions", "quiet"), text=text)
    return shlex.join(["lowmem-reft", "evaluate", *flags])


@dataclass(frozen=True)
class _Maker:
    """Makes the cells of one task."""

    options: CompareOptions
    sources: Sources
    folder: str

    def base(self, storage: Any, shown_by: int | None = None) -> Cell:
        """The untuned base; ``shown_by`` is the seed that drew the examples before its prompts."""
        examples = None if shown_by is None else self.sources.examples[shown_by]
        shots = "" if examples is None else f"shots={len(examples.rows)},"
        label, seed = f"base[{shots}storage={storage}]", shown_by or 0
        directory = self._directory(label, seed)
        evaluate = self._evaluate(storage, directory, adapter=None, examples=examples)
        evaluate = replace(evaluate, reuse=ReuseOptions(reuse="off"))
        command = scoring_command(evaluate)
        return self._cell(label, seed, directory, None, evaluate, command, examples)

    def tuned(self, spec: MethodSpec, seed: int) -> Cell:
        options, sources = self.options, self.sources
        directory = self._directory(spec.label, seed)
        training = directory / "train"
        # One adapter for all tasks, and for the trial that has found its learning rate.
        if options.scored.train_task is not None or options.matrix.lr_search is not None:
            training = self._directory(spec.entry, seed, folder="trained")
        evaluate = self._evaluate(spec.storage, directory, adapter=training / "adapter")
        method, optim = sources.resolved(spec, options)
        train = TrainOptions(
            model=evaluate.model,
            data=replace(
                evaluate.data,
                data=sources.train,
                split=options.rows.split,
                template=sources.train_template,
                limit=options.rows.limit,
            ),
            prompts=options.rows.prompts,
            held_out=HeldOutOptions(
                validation_data=sources.validation,
                validation_split=options.rows.validation_split,
                validation_limit=options.rows.validation_limit,
            ),
            scoring=sources.train_scoring,
            method=method,
            optim=optim,
            memory=options.memory,
            reuse=replace(evaluate.reuse, dequantize_upper=options.reuse.dequantize_upper),
            run=RunOptions(output_dir=training, seed=seed, quiet=True, overwrite=True, no_fit=True),
        )
        task = None if options.scored.tasks is None else sources.task
        own = written.changed(options, tasks=task, few_shot=None)
        command = command_line(own, spec.entry, seed)
        return self._cell(spec.label, seed, directory, train, evaluate, command)

    def _directory(self, label: str, seed: int, folder: str | None = None) -> Path:
        slug = re.sub(r"[^A-Za-z0-9.+=]+", "-", label).strip("-")
        task = "" if self.options.scored.tasks is None else self.sources.task
        if folder == "trained" and self.options.scored.train_task is not None:
            task = ""
        return self.options.output_dir / (folder or self.folder) / task / f"{slug}-seed{seed}"

    def _evaluate(
        self,
        storage: Any,
        directory: Path,
        adapter: Path | None,
        examples: Examples | None = None,
    ) -> EvaluateOptions:
        options, sources = self.options, self.sources
        # 16- and 32-bit weights are computed in their own dtype.
        dtype = options.base.compute_dtype if storage in QUANTIZED else "auto"
        return EvaluateOptions(
            model=ModelOptions(
                model=sources.model,
                storage=storage,
                compute_dtype=dtype,
                device=options.base.device,
                task_type=options.base.task_type,
            ),
            data=DataOptions(
                data=sources.evaluate,
                split=options.rows.eval_split,
                template=sources.template,
                max_length=options.rows.max_length,
                limit=options.scored.eval_limit,
            ),
            prompts=ScoredPromptOptions(
                **written.values(options.rows.prompts),
                examples=None if examples is None else examples.path,
            ),
            adapter=adapter,
            scoring=sources.scoring,
            beside=BesideOptions(**vars(options.scored.forgetting)),
            # Cells share their stores: another seed or rank on the same layers builds nothing.
            reuse=replace(
                options.reuse,
                reuse_dir=options.reuse.reuse_dir or options.output_dir / "reuse",
                dequantize_upper="auto",  # it is for training
            ),
            predictions=directory / "predictions.jsonl",
            quiet=True,
        )

    def _cell(
        self,
        label: str,
        seed: int,
        directory: Path,
        train: TrainOptions | None,
        evaluate: EvaluateOptions,
        command: str,
        examples: Examples | None = None,
    ) -> Cell:
        """Put a cell together with what is known before it runs."""
        sources = self.sources
        config = _config(sources, seed, train, evaluate)
        if examples is not None:
            config["prompts"]["examples"] = examples.digest
        record = {
            "method": label,
            "task": sources.task,
            "seed": seed,
            "storage": evaluate.model.storage,
            "model": sources.model_name,
            "command": command,
            "predictions": os.path.relpath(evaluate.predictions or "", self.options.output_dir),
            "examples": None if examples is None else list(examples.rows),
            "config": config,
            "key": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        }
        return Cell(directory=directory, train=train, evaluate=evaluate, record=record)


def _config(
    sources: Sources, seed: int, train: TrainOptions | None, evaluate: EvaluateOptions
) -> dict[str, Any]:
    """What a result depends on, with its inputs by their digests: valid on any machine.

    The method's options are those of the method table where none are given: a new default is a new
    cell.
    """
    config: dict[str, Any] = {
        "model": {**asdict(evaluate.model), "model": sources.model_digest},
        "eval_data": {**asdict(evaluate.data), "data": sources.evaluate_digest},
        "scoring": {**asdict(evaluate.scoring), "batch_size": evaluate.batch_size},
    }
    prompts = written.given(evaluate.prompts)
    prompts.pop("raw", None)  # which is what no template always meant
    if prompts:
        config["prompts"] = prompts
    if evaluate.beside.forgetting is not None:
        limit = evaluate.beside.forgetting_limit
        config["forgetting"] = {"text": sources.forgetting_digest, "limit": limit}
    if imported := own_modules.digests():
        config["imported"] = imported
    if train is None:
        return config
    method = find_method(train.method.method)
    name = {"method": train.method.method}
    held_out = {**asdict(train.held_out), "validation_data": sources.validation_digest}
    optim = asdict(train.optim)
    for unknown in ("group_by_length", "packing"):  # to finished cells
        if optim[unknown] == getattr(OptimOptions, unknown):
            del optim[unknown]
    if train.optim.epochs is None:
        optim["epochs"] = f"{FEWEST_EPOCHS} to {MOST_EPOCHS}, for {ENOUGH_STEPS} steps"
    return {
        **config,
        "data": {**asdict(train.data), "data": sources.train_digest},
        "method": {**method.fixed, **method.defaults, **name, **given_options(train.method)},
        "optim": optim,
        "memory": asdict(train.memory),
        "validation_data": held_out,
        "validation_scoring": asdict(train.scoring),
        "seed": seed,
    }
