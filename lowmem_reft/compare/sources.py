"""What a comparison reads: the model and each task's rows, with their digests."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from lowmem_reft.base.hub import load_config, num_blocks
from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.compare.outputs import keep_rows
from lowmem_reft.data import embedded
from lowmem_reft.data.few_shot import draw_examples
from lowmem_reft.data.general import general_digest, read_general
from lowmem_reft.data.rows import (
    Row,
    also_trained,
    as_choices,
    holdout,
    label_names,
    load_rows,
    rows_digest,
)
from lowmem_reft.data.tasks.metrics import check_names, with_metric
from lowmem_reft.data.tasks.registry import find_task, load_task
from lowmem_reft.data.tasks.task import Split, Task
from lowmem_reft.data.texts import described
from lowmem_reft.errors import InputError, naming
from lowmem_reft.machine import provenance
from lowmem_reft.methods.card import merge_card, with_template
from lowmem_reft.methods.entries import MethodSpec, resolve_learning_rate
from lowmem_reft.methods.table import for_base
from lowmem_reft.options import (
    CHAT_TEMPLATE,
    CompareOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ScoringOptions,
    written,
)
from lowmem_reft.options.values import parse_seeds


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Training rows that are put before the prompts of a base, solved."""

    path: str
    """The file of these rows."""
    digest: str
    rows: tuple[str, ...]
    """Where each was read: file and line."""


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
    """How prompts are written; None: as they are, or as chats that they are already."""
    train_template: str | None = None
    scoring: ScoringOptions = _BY_ACCURACY
    """How the rows to evaluate on are scored. A metric is named: it is part of a cell's key."""
    train_scoring: ScoringOptions = _BY_ACCURACY
    """How the validation rows are scored."""
    examples: dict[int, Examples] = field(default_factory=dict)
    """By the seed that drew them; empty without ``--few-shot``."""
    forgetting_digest: str | None = None
    """Of the general text, if there is one."""
    also_trained: str = ""
    """How many of the rows to evaluate on are trained on too, if any is."""

    @cached_property
    def hidden_size(self) -> int:
        """Width of the model's hidden vectors."""
        return int(load_config(self.model).get_text_config().hidden_size)

    @cached_property
    def num_layers(self) -> int:
        """Its blocks."""
        return num_blocks(load_config(self.model))

    def resolved(
        self, spec: MethodSpec, options: CompareOptions
    ) -> tuple[MethodOptions, OptimOptions]:
        """Return a method's options with what it takes on this model where they name nothing.

        That is where it edits, and its learning rate.
        """
        method = for_base(
            spec.options, task_type=options.base.task_type, num_layers=lambda: self.num_layers
        )
        given = replace(options.optim, **spec.optim_overrides)
        optim = resolve_learning_rate(
            method, given, lambda: self.hidden_size, lambda: self.num_layers
        )
        return method, optim


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


def with_embedded_rows(options: CompareOptions) -> CompareOptions:
    """Name the rows that the package ships, validation rows among them, where none are named."""
    if options.scored.tasks is not None or options.rows.data is not None:
        return options
    train, test = map(str, embedded.task_files())
    validation = str(embedded.validation_file())
    return written.changed(options, data=train, eval_data=test, validation_data=validation)


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
    text = options.scored.forgetting.forgetting
    named: dict[str, Any] = {part: path for part, (path, _) in parts.items()}
    named |= {f"{part}_digest": rows_digest(rows) for part, (_, rows) in parts.items()}
    return Sources(
        model=model,
        model_name=options.base.model or "embedded-llama",
        model_digest=model_digest(model),
        examples=_draw_examples(options, {part: rows for part, (_, rows) in parts.items()}, own),
        forgetting_digest=None if text is None else general_digest(read_general(text)),
        also_trained=also_trained(
            parts["evaluate"][1][: options.scored.eval_limit],
            parts["train"][1][: options.rows.limit],
        ),
        **named,
        **own,
    )


def _draw_examples(
    options: CompareOptions, parts: dict[str, Sequence[Row]], own: dict[str, Any]
) -> dict[int, Examples]:
    """Training rows to show, drawn by each seed and written below ``output_dir/data``."""
    num, found = options.scored.few_shot, {}
    if num is None:
        return {}
    held_out = [*parts.get("validation", []), *parts["evaluate"]]
    folder = "data" if options.scored.tasks is None else f"data/{own['task']}"
    for seed in parse_seeds(options.matrix.seeds):
        trained = parts["train"][: options.rows.limit]
        rows = draw_examples(trained, num, seed=seed, without=held_out)
        path = keep_rows(options, f"{folder}/{num}-shown-seed{seed}.jsonl", rows)
        sources = tuple(row.source for row in rows)
        found[seed] = Examples(path=str(path), digest=rows_digest(rows), rows=sources)
    return found


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
    template = _template(options, rows["train"])
    return _sources(
        options,
        {"evaluate": found.pop("eval"), **found},
        task=task_name(given.data or str(embedded.task_files()[0])),
        template=template,
        train_template=template,
        scoring=with_metric(options.scoring, rows["eval"]),
        train_scoring=with_metric(options.scoring, rows.get("validation", rows["eval"])),
    )


def _template(options: CompareOptions, rows: Sequence[Row]) -> str | None:
    """How the prompts of given rows are written, by name where it is the chat template.

    Cells whose prompts are written as they are have the keys that they had before there was it.
    """
    given, raw = options.rows.template, options.rows.prompts.raw
    model = ModelOptions(
        model=options.base.model or str(embedded.model_dir()), task_type=options.base.task_type
    )
    card = merge_card(None, model, template=given, max_length=None, raw=raw)
    if given is not None or raw or rows[0].messages:
        return given
    try:
        template = with_template(card, load_tokenizer(model.model)).template
    except InputError:  # without a tokenizer no cell runs, and its row says why
        return None
    if template != CHAT_TEMPLATE:
        return None
    if not options.quiet:
        print(described(template, rows), file=sys.stderr)
    return template


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
    if path == embedded.task_files()[0]:
        return "embedded-task"
    if not path.suffix:
        return data
    return path.absolute().parent.name if path.stem in ("train", "training", "data") else path.stem
