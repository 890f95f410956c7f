"""What the commands of one run write, and whether it may be written, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowmem_reft.data.mixture import parts_of
from lowmem_reft.machine.destinations import check_directory, check_file, read_or_none
from lowmem_reft.machine.files import parse_json
from lowmem_reft.machine.run_files import check_run_file

if TYPE_CHECKING:
    from lowmem_reft.options import EvaluateOptions, GenerateOptions, TrainOptions

_WRITTEN = (
    *("adapter/", "checkpoint-[0-9]*/"),
    *("run.json", "result.json", "epochs.jsonl", "best.safetensors"),
)
"""In a run's directory."""
_SHARED = ("reuse/", "runs/")
"""Stores, and what trackers log."""

_OF_A_ROW = {"source", "prompt", "prediction", "reference", "correct"}
_OF_THE_HARNESS = {"task", "doc_id", "doc", "target"}


def check_training(options: TrainOptions) -> None:
    """Refuse an output directory in which training would lose something, or cannot write.

    Raises:
        InputError: It is one.
    """
    held_out = options.held_out
    sources = {
        "model": options.model.model,
        **{f"data {part.source}": part.source for part in parts_of(options.data.data)},
        "validation_data": held_out.validation_data,
        "eval_data": held_out.eval_data,
    }
    check_directory(
        "output_dir",
        options.run.output_dir,
        written=_WRITTEN,
        shared=_SHARED,
        sources=sources,
        is_ours=None if options.run.resume else _is_run,
    )
    check_run_file(options.run.output_dir)
    _check_stores(options.reuse.reuse_dir)


def check_evaluation(options: EvaluateOptions) -> None:
    """Refuse a file of predictions that cannot be written or holds something else.

    Raises:
        InputError: It is one.
    """
    if options.predictions is not None:
        check_file(
            "predictions",
            options.predictions,
            sources={
                "data": options.data.data or None,
                "examples": options.prompts.examples,
                "forgetting": options.beside.forgetting,
            },
            is_ours=is_predictions,
        )
    _check_stores(options.reuse.reuse_dir)


def check_generation(options: GenerateOptions) -> None:
    """Refuse a file of answers that cannot be written or is the file of prompts.

    Raises:
        InputError: It is one.
    """
    if options.output is not None:
        check_file("output", options.output, sources={"input": options.input})
        check_file("output", options.output.with_name(f"{options.output.name}.run.json"))


def is_predictions(path: Path) -> bool:
    """Whether a file holds what ``evaluate --predictions`` writes, perhaps cut off at its end."""
    try:
        *lines, rest = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError):
        return False
    if rest and not rest.startswith(('{"source": ', '{"task": ')):
        return False
    return all(map(_is_prediction, lines))


def _is_prediction(line: str) -> bool:
    try:
        content = parse_json(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and (
        content.keys() >= _OF_A_ROW or content.keys() >= _OF_THE_HARNESS
    )


def _is_run(directory: Path) -> bool:
    if any(directory.glob("checkpoint-*")):
        return True  # whose they are is asked where they would be removed
    run, result = (read_or_none(directory / name) for name in ("run.json", "result.json"))
    return (isinstance(run, dict) and {"model", "data"} <= run.keys()) or (
        isinstance(result, dict) and "adapter_dir" in result
    )


def _check_stores(directory: Path | None) -> None:
    if directory is not None:
        check_directory("reuse_dir", directory)
