"""What a comparison reads: the model and each task's rows, with their digests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download

from lowmem_reft.data import embedded
from lowmem_reft.data.rows import (
    as_choices,
    holdout,
    label_names,
    load_rows,
    rows_digest,
    write_rows,
)
from lowmem_reft.data.tasks.registry import find_task, load_task
from lowmem_reft.data.tasks.task import Split, Task
from lowmem_reft.errors import InputError
from lowmem_reft.machine import provenance
from lowmem_reft.options import CompareOptions, ScoringOptions, written


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
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    """How the rows to evaluate on are scored."""
    train_scoring: ScoringOptions = field(default_factory=ScoringOptions)
    """How the validation rows are scored."""


def find_all_sources(options: CompareOptions, *, scored: Split = "test") -> list[Sources]:
    """What the cells of each task read; without named tasks, ``find_sources`` alone.

    Args:
        options: The comparison.
        scored: Split of named tasks to evaluate on; no other one than it, train and validation is
            taken.

    Raises:
        InputError: a task is unknown or named twice, or its files or the model are not there.
    """
    if options.scored.tasks is None:
        return [find_sources(options)]
    names = [name.strip() for name in options.scored.tasks.split(",")]
    if len(set(names)) < len(names):
        raise InputError(f"tasks must be different, got {options.scored.tasks!r}; drop one")
    return [_task_sources(options, name, scored) for name in names]


def _task_sources(options: CompareOptions, name: str, scored: Split) -> Sources:
    """The rows of a named task, written below ``output_dir/data`` for every cell to read.

    Training rows are drawn with a fixed seed if there is a limit: files are often sorted.
    """
    task, trained = find_task(name), find_task(options.scored.train_task or name)
    paths, digests = {}, {}
    splits: tuple[tuple[Task, Split, int | None], ...] = (
        (trained, "train", options.rows.limit),
        (trained, "validation", options.rows.validation_limit),
        (task, scored, options.scored.eval_limit),
    )
    for of, split, limit in splits:
        rows = load_task(
            of.name, split, data_dir=options.rows.data_dir, task_type=options.base.task_type
        )
        if split == "train" and limit is not None and limit < len(rows):
            rows = random.Random(0).sample(rows, limit)
        rows = rows[:limit]
        path = options.output_dir / "data" / of.name / f"{split}.jsonl"
        paths[split] = str(write_rows(path, rows))
        digests[split] = rows_digest(rows)
    model = options.base.model or str(embedded.model_dir())
    return Sources(
        model=model,
        model_name=options.base.model or "embedded-llama",
        model_digest=model_digest(model),
        train=paths["train"],
        train_digest=digests["train"],
        validation=paths["validation"],
        validation_digest=digests["validation"],
        evaluate=paths[scored],
        evaluate_digest=digests[scored],
        task=task.name,
        template=options.rows.template or task.template,
        train_template=options.rows.template or trained.template,
        scoring=_scoring(options, task),
        train_scoring=_scoring(options, trained),
    )


def _scoring(options: CompareOptions, task: Task) -> ScoringOptions:
    """The task's own way to score, but for what the user says."""
    own = {
        "scoring": task.scoring,
        "metric": task.metric,
        "extra_metrics": ",".join(task.extra_metrics) or None,
        "extractor": task.answer,
        "max_new_tokens": task.max_new_tokens,
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
    train, evaluation = given.data, given.eval_data
    if train is None:
        train, evaluation = map(str, embedded.task_files())
    train_rows = load_rows(train, split=given.split)
    if evaluation is None:
        train_rows, evaluation_rows = holdout(train_rows)
    else:
        evaluation_rows = load_rows(evaluation, split=given.eval_split)
    validation, validation_rows = given.validation_data, []
    if validation is not None:
        validation_rows = load_rows(validation, split=given.validation_split)
    classes = any(row.kind == "label" for row in train_rows) and options.base.task_type != "SEQ_CLS"
    if classes:
        names = label_names([*train_rows, *validation_rows, *evaluation_rows])
        train_rows, validation_rows, evaluation_rows = (
            as_choices(rows, names) for rows in (train_rows, validation_rows, evaluation_rows)
        )
    if classes or evaluation is None:
        train = str(write_rows(options.output_dir / "data" / "train.jsonl", train_rows))
        evaluation = str(write_rows(options.output_dir / "data" / "eval.jsonl", evaluation_rows))
    if classes and validation is not None:
        path = options.output_dir / "data" / "validation.jsonl"
        validation = str(write_rows(path, validation_rows))
    model = options.base.model or str(embedded.model_dir())
    return Sources(
        model=model,
        model_name=options.base.model or "embedded-llama",
        model_digest=model_digest(model),
        train=train,
        train_digest=rows_digest(train_rows),
        validation=validation,
        validation_digest=rows_digest(validation_rows) if validation_rows else None,
        evaluate=evaluation,
        evaluate_digest=rows_digest(evaluation_rows),
        task=task_name(options.rows.data) if options.rows.data else "embedded-task",
        template=options.rows.template,
        train_template=options.rows.template,
        scoring=options.scoring,
        train_scoring=options.scoring,
    )


def model_digest(model: str) -> str:
    """Digest of a local model's files, or the commit of a hub model.

    Raises:
        InputError: There is neither such a directory nor such a model on the hub (or in its cache).
    """
    if Path(model).is_dir():
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
