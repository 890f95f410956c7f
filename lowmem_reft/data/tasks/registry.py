"""Every task by its name, and its rows: from the public files or from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowmem_reft.data.rows import Row, as_records
from lowmem_reft.data.tasks import arithmetic, classification, commonsense, glue, instruction
from lowmem_reft.data.tasks.splits import divide
from lowmem_reft.data.tasks.task import RULES, SPLITS, Example, HubSet, LocalFiles, Split, Task
from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.machine.progress import progress
from lowmem_reft.options import TaskType

__all__ = ["TASKS", "Task", "as_records", "file_rows", "find_task", "load_task", "summary"]

TASKS: dict[str, Task] = {
    task.name: task
    for module in (commonsense, arithmetic, instruction, glue, classification)
    for task in module.TASKS
}
_ALIASES = {
    "arce": "arceasy",
    "arcc": "arcchallenge",
    "obqa": "openbookqa",
    "socialiqa": "siqa",
}


def find_task(name: str) -> Task:
    """Return the task of that name; case, "-" and "_" do not count.

    Raises:
        InputError: If there is none.
    """
    tasks = {_key(task.name): task for task in TASKS.values()}
    key = _key(name)
    key = _ALIASES.get(key, key)
    if key not in tasks:
        raise InputError(f"task must be one of {', '.join(TASKS)}, got {name!r}; choose one")
    return tasks[key]


def load_task(
    name: str,
    split: Split,
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    task_type: TaskType = "CAUSAL_LM",
) -> list[Row]:
    """Return the rows of a split; no two splits share an input.

    Args:
        name: Name of the task.
        split: Train, validation (to choose by) or test.
        data_dir: Directory with the public files; None: the hub, through ``datasets``.
        limit: Only the first rows.
        task_type: CAUSAL_LM: prompts with choices or responses; SEQ_CLS: ``text``, ``text_pair``
            and ``label`` or ``target`` for a classification or regression head.

    Raises:
        InputError: If there is no such task or split, if its files are missing or wrong (the
            message names file and line), or if its rows have no classes for SEQ_CLS.
    """
    check_counts(limit=limit)
    task = find_task(name)
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, got {split!r}; choose one")
    source, directory = _source(task, data_dir)
    rows = divide(_public(source, directory), source.rule)[0].get(split)
    if not rows:
        raise InputError(_missing(task, source, directory, split))
    return [_row(example, task, task_type) for example in rows[:limit]]


def file_rows(name: str, split: Split, data_dir: str | Path) -> list[Row]:
    """Return the rows of a public split as they are in its files, before validation is carved out.

    Raises:
        InputError: If the task has no such files there or they are wrong.
    """
    task = find_task(name)
    source, directory = _source(task, data_dir)
    examples = _read(source, directory, split)
    if examples is None:
        raise InputError(_missing(task, source, directory, split))
    return [_row(example, task, "CAUSAL_LM") for example in examples]


def summary(data_dir: str | Path | None = None) -> list[dict[str, Any]]:
    """Describe every task for ``--json``.

    Args:
        data_dir: Also count the rows of the tasks whose files are there: ``files`` per public
            split, ``rows`` per split as ``load_task`` gives them, ``num_removed`` because another
            split holds the same input; or ``error``, where a file is wrong.
    """
    tasks = progress(list(TASKS.values()), "counting rows", quiet=data_dir is None)
    return [_described(task, data_dir) for task in tasks]


def _described(task: Task, data_dir: str | Path | None) -> dict[str, Any]:
    source = task.local[0]
    carves_test = source.rule in ("halved", "held_out_twice")
    described: dict[str, Any] = {
        "name": task.name,
        "family": task.family,
        "about": task.about,
        "metric": task.metric,
        "extra_metrics": list(task.extra_metrics),
        "scoring": task.scoring,
        "answer": task.answer,
        "template": task.template,
        "labels": list(task.labels),
        "splits": {
            "directories": list(source.directories),
            "train": list(source.train),
            "validation": RULES[source.rule],
            "test": list(source.test) or ("see validation" if carves_test else []),
        },
        "hub": task.hub.name if task.hub else None,
    }
    if data_dir is not None and _find_local(task, data_dir) is not None:
        try:
            described |= _counts(task, data_dir)
        except InputError as error:
            described["error"] = str(error)
    return described


def _counts(task: Task, data_dir: str | Path) -> dict[str, Any]:
    source, directory = _source(task, data_dir)
    public = _public(source, directory)
    divided, num_removed = divide(public, source.rule)
    return {
        "files": {name: len(public[name]) for name in SPLITS if name in public},
        "rows": {name: len(divided[name]) for name in SPLITS if name in divided},
        "num_removed": num_removed,
    }


def _source(task: Task, data_dir: str | Path | None) -> tuple[LocalFiles | HubSet, Path]:
    """Where to read from: local files with their directory, or the hub."""
    if data_dir is not None:
        found = _find_local(task, data_dir)
        if found is None:
            files = task.local[0]
            wanted = ", ".join((*files.train, *files.validation, *files.test))
            raise InputError(
                f"data_dir must hold the files of {task.name}, got {str(data_dir)!r}; put {wanted} "
                f"into it or into a folder {' or '.join(files.directories)} in it"
            )
        return found
    if task.hub is None:
        raise InputError(
            f"data_dir must be given for {task.name}, got none; its rows are not on the hub as "
            "they were published"
        )
    return task.hub, Path()


def _find_local(task: Task, data_dir: str | Path) -> tuple[LocalFiles, Path] | None:
    """The first whole set of files that is there, in folders of its own or in the root.

    Where no set is whole, the first of which there is a file.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise InputError(f"data_dir must be an existing directory, got {str(data_dir)!r}; check it")
    places = [(files, root / name) for files in task.local for name in files.directories]
    places += [(files, root) for files in task.local]
    for is_there in (all, any):
        for files, directory in places:
            names = (*files.train, *files.validation, *files.test)
            if is_there((directory / name).is_file() for name in names):
                return files, directory
    return None


def _public(source: LocalFiles | HubSet, directory: Path) -> dict[Split, list[Example]]:
    return {split: found for split in SPLITS if (found := _read(source, directory, split))}


def _read(source: LocalFiles | HubSet, directory: Path, split: Split) -> list[Example] | None:
    """The examples of a public split; None if it is not there."""
    names: tuple[str, ...] = getattr(source, split)
    if isinstance(source, HubSet):
        records = (record for name in names for record in _hub_records(source, name))
    else:
        paths = [directory / name for name in names]
        if not any(path.is_file() for path in paths):
            return None
        records = (record for path in paths for record in source.read(path))
    return [source.convert(record, place) for place, record in records] or None


def _hub_records(hub: HubSet, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        records = datasets.load_dataset(hub.id, hub.config, split=split, revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"data_dir must be given where the hub cannot be read, got none for {hub.name} "
            f"({error}); give it or check the connection"
        ) from error
    for number, record in enumerate(records, start=1):
        yield f"{hub.name}[{split}], row {number}", record


def _missing(task: Task, source: LocalFiles | HubSet, directory: Path, split: Split) -> str:
    """The message for a split that cannot be had."""
    names: Sequence[str] = getattr(source, split)
    if split == "validation" and not names:
        names = source.train
    if isinstance(source, LocalFiles) and names:
        return (
            f"{split} rows of {task.name} must be in {', '.join(names)}, got none in "
            f"{str(directory)!r}; add the file{_instead(task)}"
        )
    return f"split must be one that {task.name} has, got {split!r}; choose another{_instead(task)}"


def _instead(task: Task) -> str:
    mix = {"commonsense": "commonsense170k", "arithmetic": "math10k"}.get(task.family)
    if mix is None:
        return ""
    if task.name == mix:
        family = [other.name for other in TASKS.values() if other.family == task.family]
        others = ", ".join(name for name in family if name != mix)
        return f": it is for training, to be tested on {others}"
    return f", or train on {mix} as the paper does"


def _row(example: Example, task: Task, task_type: TaskType) -> Row:
    if task_type == "SEQ_CLS":
        if example.label is None and example.target is None:
            raise InputError(
                f"task_type must be CAUSAL_LM for {task.name}, got 'SEQ_CLS'; its rows have no "
                "classes"
            )
        return Row(
            source=example.source,
            prompt=example.text,
            text_pair=example.text_pair,
            response=example.label,
            label=example.label,
            target=example.target,
        )
    return Row(
        source=example.source,
        prompt=example.prompt,
        response=example.response if example.answer is None else example.choices[example.answer],
        choices=example.choices,
        answer=example.answer,
        target=example.target,
    )


def _key(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
