"""What a comparison reads: the model and each task's rows, with their digests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from lowmem_reft.compare.outputs import keep_rows
from lowmem_reft.data import embedded
from lowmem_reft.data.rows import (
    Row,
    as_choices,
    holdout,
    label_names,
    load_rows,
    rows_digest,
)
from lowmem_reft.data.tasks.metrics import check_names, with_metric
from lowmem_reft.data.tasks.registry import find_task, load_task
from lowmem_reft.data.tasks.task import Split, Task
from lowmem_reft.errors import InputError, naming
from lowmem_reft.machine import provenance
from lowmem_reft.options import CompareOptions, ScoringOptions, written

_BY_ACCURACY = ScoringOptions(metric="accuracy")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the cells of one task read: the model and the rows, by path or id and by digest."""

    model: str
    model_name: str
    model_digest: str
    train: str
    train_digest: str
    validation: str | None = None
    """Rows to choose the epoch by; None keeps the last one."""
    validation_digest: str | None = None
    evaluate: str
    evaluate_digest: str
    task: str
    template: str | None = None
    train_template: str | None = None
    scoring: ScoringOptions = _BY_ACCURACY
    """How the rows to evaluate on are scored. A metric is named: it is part of a cell's key."""
    train_scoring: ScoringOptions = _BY_ACCURACY
    """How the validation rows are scored."""


def find_all_sources(options: CompareOptions, *, scored: Split = "test") -> list[Sources]:
    """What the cells of each task read; without named tasks, ``find_sources`` alone.

    Args:
        options: The comparison.
        scored: Split of named tasks to evaluate on; no other one than it, train and validation is
            taken.

    Raises:
        InputError: A task is unknown or named twice, or its files or the model are not there.
    """
    check_names(options.scoring)
    if options.scored.tasks is None:
        return [find_sources(options)]
    names = [name.strip() for name in options.scored.tasks.split(",")]
    if len(set(names)) < len(names):
        raise InputError(f"tasks must be different, got {options.scored.tasks!r}; drop one")
    return [_task_sources(options, name, scored) for name in names]


def _task_sources(options: CompareOptions, name: str, scored: Split) -> Sources:
    """The rows of a named task, written below ``output_dir/data`` for every cell to read.

    Rows are drawn with a fixed seed where there is a limit: files are often sorted by class.
    """
    with naming("tasks"):
        task = find_task(name)
    with naming("train_task"):
        trained = find_task(options.scored.train_task or name)
    parts: dict[str, tuple[str | None, Sequence[Row]]] = {}
    chosen: tuple[tuple[str, Task, Split, int | None], ...] = (
        ("train", trained, "train", options.rows.limit),
        ("validation", trained, "validation", options.rows.validation_limit),
        ("evaluate", task, scored, options.scored.eval_limit),
    )
    for part, of, split, limit in chosen:
        rows = load_task(
            of.name, split, data_dir=options.rows.data_dir, task_type=options.base.task_type
        )
        if limit is not None and limit < len(rows):
            rows = random.Random(0).sample(rows, limit)
        name = f"data/{of.name}/{split}.jsonl"
        parts[part] = str(keep_rows(options, name, rows)), rows
    return _sources(
        options,
        parts,
        task=task.name,
        template=options.rows.template or task.template,
        train_template=options.rows.template or trained.template,
        scoring=_scoring(options, task, trained),
        train_scoring=_scoring(options, trained, trained),
    )


def _sources(
    options: CompareOptions, parts: dict[str, tuple[str | None, Sequence[Row]]], **own: Any
) -> Sources:
    """The sources of parts, each the path or id of its rows, and the rows."""
    model = options.base.model or str(embedded.model_dir())
    named: dict[str, Any] = {part: path for part, (path, _) in parts.items()}
    named |= {f"{part}_digest": rows_digest(rows) for part, (_, rows) in parts.items()}
    return Sources(
        model=model,
        model_name=options.base.model or "embedded-llama",
        model_digest=model_digest(model),
        **named,
        **own,
    )


def _scoring(options: CompareOptions, task: Task, trained: Task) -> ScoringOptions:
    """The task's own way to score, but for what the user says; answers are as long as trained."""
    own = {
        # An instruction's text is generated if another metric asks for it.
        "scoring": "auto" if task.metric == "loss" else task.scoring,
        "metric": task.metric,
        "extra_metrics": ",".join(task.extra_metrics) or None,
        "extractor": task.answer,
        "max_new_tokens": max(task.max_new_tokens, trained.max_new_tokens),
    }
    return ScoringOptions(**{**own, **written.given(options.scoring)})


def find_sources(options: CompareOptions) -> Sources:
    """Locate the model and the rows, fall back on the embedded ones, and take their digests.

    Without evaluation rows, a fixed tenth of the training rows is held out. Rows with labels become
    rows with choices over the classes of all parts, so that the base and every method choose among
    the same. What is not read as it was given is written below ``output_dir/data``, for every cell
    to read.

    Raises:
        InputError: The model or the data are not there.
    """
    given = options.rows
    paths = {"train": given.data, "validation": given.validation_data, "eval": given.eval_data}
    if given.data is None:
        paths["train"], paths["eval"] = map(str, embedded.task_files())
    splits = {"train": given.split, "validation": given.validation_split, "eval": given.eval_split}
    rows = {
        part: load_rows(path, split=splits[part])
        for part, path in paths.items()
        if path is not None
    }
    rewritten: set[str] = set()
    if "eval" not in rows:
        rows["train"], rows["eval"] = holdout(rows["train"])
        rewritten = {"train", "eval"}
    if options.base.task_type != "SEQ_CLS" and any(row.kind == "label" for row in rows["train"]):
        names = label_names([row for part in rows.values() for row in part])
        rows = {part: as_choices(own, names) for part, own in rows.items()}
        rewritten = set(rows)
    for part in rewritten:
        paths[part] = str(keep_rows(options, f"data/{part}.jsonl", rows[part]))
    found = {part: (paths[part], own) for part, own in rows.items()}
    return _sources(
        options,
        {"evaluate": found.pop("eval"), **found},
        task=task_name(given.data) if given.data else "embedded-task",
        template=given.template,
        train_template=given.template,
        scoring=with_metric(options.scoring, rows["eval"]),
        train_scoring=with_metric(options.scoring, rows.get("validation", rows["eval"])),
    )


def model_digest(model: str) -> str:
    """Digest of a local model's files, or the commit of a hub model.

    Raises:
        InputError: There is neither such a directory nor such a model on the hub (or in its cache).
    """
    if Path(model, "config.json").is_file():
        return provenance.directory_digest(model)
    try:
        config = Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model must be a directory or a hub id, got {model!r}; check the name ({error})"
        ) from error
    return f"hub:{config.parent.name}"


def task_name(data: str) -> str:
    """A short name for the rows: the file's, or the folder's if the file is just called train."""
    path = Path(data)
    if not path.suffix:
        return data
    return path.absolute().parent.name if path.stem in ("train", "training", "data") else path.stem
