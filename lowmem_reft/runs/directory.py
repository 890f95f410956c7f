"""The directory of a run: what the run began with, and the checkpoints that it goes on from.

``run.json`` holds the settings that decide what is trained. ``--resume`` takes the same ones alone:
with others the checkpoint would be of another adapter, or of other rows. How long the run goes on,
where and how fast may change.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.rows import rows_digest
from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes
from lowmem_reft.machine.files import write_text_whole
from lowmem_reft.options import written

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lowmem_reft.data.rows import Row
    from lowmem_reft.runs.resolve import Run

FILE_NAME = "run.json"

_OF_THE_CARD = ("storage", "compute_dtype", "task_type", "template", "max_length", "seed")
_OF_THE_OPTIMIZER = ("lr", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "optim")


def prepare_directory(run: Run, validation: Sequence[Row]) -> None:
    """Make the directory ready for a run: a new one, or one that goes on.

    The checkpoints of a finished run make way for a new one. The rows of ``validation``, which
    choose the best epoch, are a setting, too.

    Raises:
        InputError: The checkpoints are of a run that has not finished and is not resumed; it is to
            go on with other settings; or there is none to go on from.
    """
    directory, options = run.directory, run.options.run
    if not processes.is_main():
        processes.wait()
        if not directory.is_dir():
            raise InputError(
                f"output_dir must be a directory that all machines see, got {str(directory)!r}; "
                "choose one on a shared file system"
            )
        return
    settings = _settings(run, validation)
    if options.resume:
        _check_same(directory, settings)
        _check_length(run)
    else:
        _clear(directory, quiet=options.quiet)
    (directory / "result.json").unlink(missing_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings, indent=2) + "\n"
    write_text_whole(directory / FILE_NAME, text)
    processes.wait()


def last_checkpoint(directory: Path) -> Path:
    """Return the newest checkpoint in a run's directory.

    Raises:
        InputError: There is none.
    """
    found = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    if not found:
        raise InputError(
            f"resume must find a checkpoint in {str(directory)!r}, got none; leave it out"
        )
    return max(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _clear(directory: Path, *, quiet: bool) -> None:
    """Remove the checkpoints of a finished run, and say that its adapter will be replaced."""
    old = sorted(directory.glob("checkpoint-*"))
    is_finished = (directory / "result.json").is_file()
    if old and not is_finished:
        raise InputError(
            f"output_dir must not hold checkpoints of an unfinished run, got "
            f"{str(directory)!r}; add --resume, choose another directory or delete them"
        )
    if is_finished and (directory / "adapter").is_dir() and not quiet:
        print(f"the adapter in {directory} is replaced: a run has finished there", file=sys.stderr)
    for checkpoint in old:
        shutil.rmtree(checkpoint)


def _settings(run: Run, validation: Sequence[Row]) -> dict[str, Any]:
    """Return what decides the trained adapter, by the names of the options."""
    card, optim = run.card, run.optim
    settings = {
        "model": f"checkpoint {card.base_digest}" if card.base_digest else card.base,
        "data": f"rows {card.data_digest}",
        **{name: getattr(card, name) for name in _OF_THE_CARD},
        **written.values(run.options.method),
        **{name: getattr(optim, name) for name in _OF_THE_OPTIMIZER},
        "effective batch": processes.effective_batch(optim),
        "validation_data": f"rows {rows_digest(validation)}" if validation else None,
    }
    if validation:
        settings |= asdict(run.options.scoring)
    return settings


def _check_same(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse other settings than the run began with, where these are known."""
    path = directory / FILE_NAME
    if not path.is_file():
        return
    try:
        begun = dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InputError(f"{path} must be JSON, got {error}; restore or delete it") from error
    differing = [
        f"{name} {_shown(value)} instead of {_shown(begun[name])}"
        for name, value in settings.items()
        if name in begun and begun[name] != value
    ]
    if differing:
        raise InputError(
            f"resume must keep the settings that the run in {str(directory)!r} began with, got "
            f"{', '.join(differing)}; give the old ones, or choose another output_dir and leave "
            "--resume out"
        )


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith(("rows ", "checkpoint ")):
        return f"({value[: value.index(' ') + 13]})"
    return "not given" if value is None else repr(value)


def _check_length(run: Run) -> None:
    """Refuse fewer steps than were taken before the last checkpoint."""
    step, optim = _step(last_checkpoint(run.directory)), run.optim
    num_steps = optim.num_steps(len(run.examples), num_processes=processes.num_processes())
    name, value = ("max_steps", num_steps) if optim.max_steps > 0 else ("epochs", optim.epochs)
    if num_steps < step:
        raise InputError(
            f"{name} must reach the last checkpoint, which is of step {step}, got {value:g}"
            + ("" if name == "max_steps" else f", which are {num_steps} steps")
            + "; raise it, or use that checkpoint's adapter"
        )
