"""The directory of a run: what the run began with, and the checkpoints that it goes on from.

``run.json`` holds the settings that decide what is trained. ``--resume`` takes the same ones alone:
with others the checkpoint would be of another adapter, or of other rows. How long the run goes on,
where and how fast may change.
"""

from __future__ import annotations

import json
import shutil
import sys
import uuid
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lowmem_reft.data.rows import rows_digest
from lowmem_reft.data.tasks.metrics import with_metric
from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes
from lowmem_reft.machine.devices import dtype_name
from lowmem_reft.machine.files import parse_json, sync, sync_tree, write_text_whole
from lowmem_reft.machine.locks import alone
from lowmem_reft.methods.table import all_options
from lowmem_reft.options import written
from lowmem_reft.runs import checkpoints
from lowmem_reft.runs.checkpoints import BEST, EPOCHS_FILE, OWN, Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lowmem_reft.data.rows import Row
    from lowmem_reft.runs.resolve import Run

FILE_NAME = "run.json"
ADAPTER = "adapter"
_BEFORE = "adapter-before"

_OF_THE_CARD = ("storage", "task_type", "template", "max_length", "seed")
_OF_THE_OPTIMIZER = (
    "lr",
    "schedule",
    "warmup_ratio",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "group_by_length",
    "packing",
)


_RESULTS = (ADAPTER, "result.json", EPOCHS_FILE, BEST)
"""What a run writes beside its checkpoints, and replaces."""


@contextmanager
def held(run: Run) -> Iterator[None]:
    """Keep other runs out of the directory of this one, which is made if need be.

    Raises:
        InputError: Another run is at work there, it cannot be written to, or it holds files with
            the names of a run's that no run wrote.
    """
    if not processes.is_main():
        yield
        return
    directory = run.directory
    if run.options.run.resume and not (directory / FILE_NAME).exists():
        raise InputError(
            f"resume must find a checkpoint in {str(directory)!r}, got none, as no run has begun "
            "there; leave it out"
        )
    _refuse_links(directory)
    with alone(directory, directory / OWN / "lock"):
        yield


def prepare_directory(run: Run, validation: Sequence[Row]) -> tuple[str, Checkpoint | None]:
    """Make the directory ready for a run: a new one, or one that goes on.

    What a finished run has left makes way for the same run again, and with ``--overwrite`` for any.
    The rows of ``validation``, which choose the best epoch, are a setting, too.

    Returns:
        The run's id, and the checkpoint to go on from: None begins.

    Raises:
        InputError: The checkpoints are of a run that has not finished and is not resumed; it is to
            go on with other settings; a run with other settings has finished there; or something
            there was not written by a run.
    """
    prepared = _prepare(run, validation) if processes.is_main() else ("", None)
    prepared = processes.agree(prepared)
    if not run.directory.is_dir():
        raise InputError(
            f"output_dir must be a directory that all machines see, got {str(run.directory)!r}; "
            "choose one on a shared file system"
        )
    return prepared


def _prepare(run: Run, validation: Sequence[Row]) -> tuple[str, Checkpoint | None]:
    directory, options = run.directory, run.options.run
    settings = _settings(run, validation)
    begun = _begun(directory)
    _finish_replacing(directory)
    if not options.resume:
        _check_free(run, begun, settings)
        begun, checkpoint = {"id": uuid.uuid4().hex}, None
    else:
        _check_same(directory, begun, settings)
        checkpoint = _go_on_from(run, begun.get("id"))
        begun.setdefault("id", uuid.uuid4().hex if checkpoint is None else checkpoint.note["run"])
    # From here on checkpoints and results of an earlier run count for nothing.
    known = {**settings, **_length(run), "id": begun["id"]}
    text = json.dumps(known, indent=2) + "\n"
    write_text_whole(directory / FILE_NAME, text)
    sync(directory)
    (directory / "result.json").unlink(missing_ok=True)
    for path in checkpoints.named_so(directory):
        kept = checkpoint is not None and path == checkpoint.directory
        if not kept and checkpoints.is_ours(path):
            checkpoints.remove(path)
    return begun["id"], checkpoint


def save_whole(directory: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a directory, then put it in the place of the adapter of a run.

    Files there that it does not write stay.
    """
    made, target = directory / OWN / ADAPTER, directory / ADAPTER
    if made.exists():
        shutil.rmtree(made)
    made.mkdir()
    write(made)
    if target.is_dir():
        for path in target.iterdir():
            if not (made / path.name).exists():
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, made / path.name)
    sync_tree(made)
    before = directory / OWN / _BEFORE
    if target.is_dir():
        target.rename(before)
    made.rename(target)
    sync(directory)
    if before.exists():
        shutil.rmtree(before)


def _finish_replacing(directory: Path) -> None:
    """Clear away what a killed run was making; an adapter that it was replacing comes back."""
    own = directory / OWN
    if (own / _BEFORE).is_dir() and not (directory / ADAPTER).exists():
        (own / _BEFORE).rename(directory / ADAPTER)
    for path in own.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _refuse_links(directory: Path) -> None:
    """Refuse links where a run writes or deletes: what they lead to is not the run's."""
    names = [directory / name for name in (OWN, FILE_NAME, *_RESULTS)]
    for path in (*names, *checkpoints.named_so(directory)):
        if path.is_symlink():
            raise InputError(
                f"output_dir must hold no link that a run would write through, got {str(path)!r}, "
                "which leads elsewhere; remove the link or choose another directory"
            )


def _begun(directory: Path) -> dict[str, Any]:
    """Return the settings that a run in the directory began with; empty if none did."""
    path = directory / FILE_NAME
    if not path.exists():
        return {}
    try:
        begun = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} must be JSON, got {error}; restore or delete it") from error
    if not isinstance(begun, dict) or "effective batch" not in begun:
        raise InputError(
            f"{path} must hold the settings of a run, got something else; move it or choose "
            "another output_dir"
        )
    if begun.get("compute_dtype") == "auto":
        del begun["compute_dtype"]  # earlier releases did not say what it stood for
    return begun


def _check_free(run: Run, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse what is not to be replaced, and say that a finished run's adapter will be."""
    directory, options = run.directory, run.options.run
    is_finished = (directory / "result.json").is_file()
    found = checkpoints.named_so(directory)
    for path in found:
        if not checkpoints.is_ours(path):
            raise _not_ours(path)
    for name in _RESULTS:
        path = directory / name
        if path.exists() and not begun and not is_finished:
            raise _not_ours(path)
        if path.exists() and path.is_dir() != (name == ADAPTER):
            raise _not_ours(path)
    whole, _ = checkpoints.last_whole(directory, begun.get("id"))
    if options.overwrite:
        return
    if found and not is_finished and (whole is not None or not begun):
        raise InputError(
            f"output_dir must not hold checkpoints of an unfinished run, got "
            f"{str(directory)!r}; add --resume, choose another directory, or replace them with "
            "--overwrite"
        )
    differing = _differing(begun, {**settings, **_length(run)})
    if is_finished and (differing or not begun):
        raise InputError(
            f"output_dir must not hold a finished run with other settings, got {str(directory)!r}: "
            f"{', '.join(differing) or 'its settings are not known'}; choose another directory, or "
            "replace that run with --overwrite"
        )
    if is_finished and (directory / ADAPTER).is_dir() and not options.quiet:
        print(f"the adapter in {directory} is replaced: a run has finished there", file=sys.stderr)


def _not_ours(path: Path) -> InputError:
    return InputError(
        f"output_dir must not hold {path.name} that no run wrote, got {str(path)!r}, which a run "
        "would replace; move it or choose another directory"
    )


def _go_on_from(run: Run, run_id: str | None) -> Checkpoint | None:
    """Return the checkpoint to go on from, and say what was stepped over or that there is none."""
    directory = run.directory
    for path in checkpoints.named_so(directory):
        if not checkpoints.is_ours(path) and not checkpoints.is_half(path):
            raise _not_ours(path)
    checkpoint, why = checkpoints.last_whole(directory, run_id)
    if checkpoint is not None:
        _check_length(run, checkpoint.step)
    then = (
        f"the run in {directory} begins anew, as it left no whole checkpoint"
        if checkpoint is None
        else f"the run in {directory} goes on from step {checkpoint.step}"
    )
    if why or checkpoint is None:
        print("; ".join([*why, then]), file=sys.stderr)
    return checkpoint


def _settings(run: Run, validation: Sequence[Row]) -> dict[str, Any]:
    """Return what decides the trained adapter, by the names of the options."""
    card, optim, method = run.card, run.optim, written.values(run.options.method)
    resolved = all_options(run.options.method)
    settings = {
        "model": f"checkpoint {card.base_digest}" if card.base_digest else card.base,
        "data": f"rows {card.data_digest}",
        **{name: getattr(card, name) for name in _OF_THE_CARD},
        "compute_dtype": dtype_name(run.compute_dtype),
        **method,
        # Those of profiles and defaults too: another release may have others.
        **{name: value for name, value in resolved.items() if method[name] is None},
        **{name: getattr(optim, name) for name in _OF_THE_OPTIMIZER},
        "effective batch": processes.effective_batch(optim),
        "validation_data": f"rows {rows_digest(validation)}" if validation else None,
    }
    if validation:
        settings |= asdict(with_metric(run.options.scoring, validation))
        settings["eval_steps"] = run.options.choosing.eval_steps
    return settings


def _check_same(directory: Path, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    """Refuse other settings than the run began with, where these are known."""
    if differing := _differing(begun, settings):
        raise InputError(
            f"resume must keep the settings that the run in {str(directory)!r} began with, got "
            f"{', '.join(differing)}; give the old ones, or choose another output_dir and leave "
            "--resume out"
        )


def _differing(begun: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Say what is not as a run began with it, where that is known."""
    return [
        f"{name} {_shown(value)} instead of {_shown(begun[name])}"
        for name, value in settings.items()
        if name in begun and begun[name] != value
    ]


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith(("rows ", "checkpoint ")):
        return f"({value[: value.index(' ') + 13]})"
    return "not given" if value is None else repr(value)


def _check_length(run: Run, step: int) -> None:
    """Refuse fewer steps than were taken before the last checkpoint."""
    optim, num_steps = run.optim, run.num_steps
    name, value = ("max_steps", num_steps) if optim.max_steps > 0 else ("epochs", optim.epochs)
    if num_steps < step:
        raise InputError(
            f"{name} must reach the last checkpoint, which is of step {step}, got {value:g}"
            + ("" if name == "max_steps" else f", which are {num_steps} steps")
            + "; raise it, or use that checkpoint's adapter"
        )


def _length(run: Run) -> dict[str, Any]:
    """Return what decides how long a run goes on, which may change when it is resumed."""
    return {"num_steps": run.num_steps, "patience": run.options.choosing.patience}
