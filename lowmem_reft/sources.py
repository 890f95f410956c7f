"""What a comparison reads: the model and the rows, found or fallen back on, with their digests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft import provenance
from lowmem_reft.errors import InputError
from lowmem_reft.options import CompareOptions

if TYPE_CHECKING:
    from lowmem_reft.rows import Row


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What every cell reads: the model and the rows, by path or id and by digest."""

    model: str
    model_name: str
    model_digest: str
    train: str
    train_digest: str
    evaluate: str
    evaluate_digest: str
    task: str


def find_sources(options: CompareOptions) -> Sources:
    """Locate the model and the rows, fall back on the embedded ones, and take their digests.

    Without evaluation rows, a fixed tenth of the training rows is held out. Rows with labels become
    rows with choices over the classes of both parts, so that the base and every method choose among
    the same. What is not read as it was given is written below ``output_dir/data``, for every cell
    to read.

    Raises:
        InputError: The model or the data are not there, or there is evaluation data without
        training data.
    """
    from lowmem_reft import embedded
    from lowmem_reft.data import as_choices, holdout, label_names, load_rows, rows_digest

    if options.data is None and options.eval_data is not None:
        raise InputError(
            f"eval_data must come with data, got {options.eval_data!r} alone; add --data"
        )
    train, evaluation = options.data, options.eval_data
    if train is None:
        train, evaluation = map(str, embedded.task_files())
    train_rows = load_rows(train, split=options.split)
    if evaluation is None:
        train_rows, evaluation_rows = holdout(train_rows)
    else:
        evaluation_rows = load_rows(evaluation, split=options.eval_split)
    classes = any(row.kind == "label" for row in train_rows)
    if classes:
        names = label_names([*train_rows, *evaluation_rows])
        train_rows, evaluation_rows = (
            as_choices(train_rows, names),
            as_choices(evaluation_rows, names),
        )
    if classes or evaluation is None:
        train = str(_write_rows(options.output_dir / "data" / "train.jsonl", train_rows))
        evaluation = str(_write_rows(options.output_dir / "data" / "eval.jsonl", evaluation_rows))
    model = options.model or str(embedded.model_dir())
    return Sources(
        model=model,
        model_name=options.model or "embedded-llama",
        model_digest=model_digest(model),
        train=train,
        train_digest=rows_digest(train_rows),
        evaluate=evaluation,
        evaluate_digest=rows_digest(evaluation_rows),
        task=task_name(options.data) if options.data else "embedded-task",
    )


def model_digest(model: str) -> str:
    """Digest of a local model's files, or the commit of a hub model.

    Raises:
        InputError: There is neither such a directory nor such a model on the hub (or in its cache).
    """
    if Path(model).is_dir():
        return provenance.directory_digest(model)
    from huggingface_hub import hf_hub_download

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


def _write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_row_record(row), ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _row_record(row: Row) -> dict[str, Any]:
    if row.kind == "messages":
        return {"messages": row.messages}
    if row.kind == "choices":
        return {"prompt": row.prompt, "choices": row.choices, "answer": row.answer}
    return {"prompt": row.prompt, "response": row.response}
