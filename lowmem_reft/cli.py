"""The command line, ``lowmem-reft COMMAND``: train, evaluate, generate, compare, plan, ...

Parsed by tyro from the dataclasses in ``options``, so every flag, default and help text is
written there. Nothing heavy is imported before the options are known to be well-formed.

Exit codes: 0; 2: input that the user can fix; 3: plan --fit finds nothing that fits; 1: any other
failure; 130: Ctrl-C or SIGTERM.
With ``--json`` the last line of standard output is one JSON object; all else goes to stderr.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # before the imports below: Ctrl-C is heard during them too
    from lowmem_reft.__main__ import main as guarded

    sys.exit(guarded())

import contextlib
import gc
import importlib
import json
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from lowmem_reft import __version__
from lowmem_reft.base import import_bitsandbytes_without_compiler
from lowmem_reft.errors import InputError, is_full_disk, is_out_of_memory, is_wrong_path
from lowmem_reft.machine import own_modules, processes
from lowmem_reft.machine.files import plain
from lowmem_reft.machine.progress import show_bars, without_bars_of_transformers
from lowmem_reft.machine.terminal import for_stream, harmless
from lowmem_reft.options import (
    ChatOptions,
    CompareOptions,
    EvaluateOptions,
    ExportPyreftOptions,
    GenerateOptions,
    ImportPyreftOptions,
    JudgeOptions,
    MethodsOptions,
    PlanOptions,
    ProfileOptions,
    ReportOptions,
    ReuseCommandOptions,
    ShowOptions,
    SweepOptions,
    TasksOptions,
    TrainOptions,
    UiOptions,
    parsing,
    written,
)

Options: TypeAlias = Any
"""An instance of a class of ``_COMMANDS``."""


@dataclass(frozen=True)
class _Command:
    options: Any
    """Dataclass that its flags and its help are made from."""
    handler: str
    """``module:function``, imported when it is called, because most import torch."""
    prints_tables: bool = False
    """Whether the handler shows the result itself."""
    loads_nothing: bool = False
    """Whether it needs neither torch nor transformers."""


_LISTING = {"prints_tables": True, "loads_nothing": True}

_COMMANDS: dict[str, _Command] = {
    "train": _Command(TrainOptions, "runs.train:run_training"),
    "evaluate": _Command(EvaluateOptions, "runs.evaluate:run_evaluation"),
    "generate": _Command(GenerateOptions, "runs.generate:run_generation"),
    "chat": _Command(ChatOptions, "runs.chat:run_chat"),
    "compare": _Command(CompareOptions, "compare.matrix:run_comparison"),
    "report": _Command(ReportOptions, "compare.report.joining:run_report", loads_nothing=True),
    "judge": _Command(JudgeOptions, "runs.judge:run_judge"),
    "sweep": _Command(SweepOptions, "compare.sweep:run_sweep"),
    "data": _Command(ShowOptions, "runs.show:run_show", prints_tables=True),
    "plan": _Command(PlanOptions, "memory.verdict:run_plan", prints_tables=True),
    "profile": _Command(ProfileOptions, "memory.profile:run_profile", prints_tables=True),
    "tasks": _Command(TasksOptions, "data.tasks.listing:run_tasks", **_LISTING),
    "methods": _Command(MethodsOptions, "methods.listing:run_methods", **_LISTING),
    "reuse": _Command(ReuseCommandOptions, "reuse.command:run_reuse", **_LISTING),
    "ui": _Command(UiOptions, "ui.server:run_ui", loads_nothing=True),
    "import-pyreft": _Command(ImportPyreftOptions, "methods.pyreft.importing:run_import"),
    "export-pyreft": _Command(ExportPyreftOptions, "methods.pyreft.exporting:run_export"),
}

_FORMER = {"cache": "reuse"}
"""Names that subcommands had before this release; the next one knows them no longer."""

_MOST_CHARACTERS = 2000
"""Of a line that is printed about an error."""

_LAUNCHER_ENDS_ALL_S = 2.0
"""Within this time a launcher that sees one process fail has ended the others."""

_DESCRIPTION = f"""ReFT, LoRA and QLoRA on a frozen 4- or 8-bit base (version {__version__}).

--import NAME imports a module of yours first, which adds interventions, methods or tasks.
LOWMEM_REFT_DEBUG=1 in the environment shows the traceback of a failure."""

_OUT_OF_MEMORY_ADVICE = (
    "try a smaller --batch-size, shorter texts, nf4 storage and, in training, "
    "--activation-checkpointing with --gradient-accumulation"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Arguments without the program's name; those of the process if not given.

    Returns:
        The exit code. Help (0) and flags that are no options (2) leave through ``SystemExit``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["--version"], ["-V"]):
        print(f"lowmem-reft {__version__}")
        return 0
    if arguments and arguments[0] in _FORMER:
        now = _FORMER[arguments[0]]
        _report(arguments[0], f"this is now lowmem-reft {now}; use that name", code=0)
        arguments[0] = now
    try:
        arguments = own_modules.take(arguments)
        options = _parse(arguments)
        if processes.num_processes() > 1 and not isinstance(options, TrainOptions):
            raise InputError(
                f"num_processes must be 1 for {arguments[0]}, got {processes.num_processes()}; "
                "only train shares its work between processes, so leave the launcher out"
            )
    except BrokenPipeError:
        return _reader_left()
    except InputError as error:
        return _report(arguments[0], f"error: {error}", code=2)
    except OSError as error:  # of a path that an option names
        return _report(arguments[0], f"error: {_wrong_path(error)}", code=2)
    command = arguments[0]
    try:
        with _sigterm_as_interrupt(), _warnings_in_one_line(command):
            result = _run(_COMMANDS[command], options)
    except BrokenPipeError:
        return _reader_left()
    except KeyboardInterrupt:
        return _report(command, "interrupted", _what_is_kept(options), code=130)
    except InputError as error:
        return _report(command, f"error: {error}", code=2)
    except Exception as error:
        if is_wrong_path(error):
            return _report(command, f"error: {_wrong_path(error)}", code=2)
        if processes.lost_a_process(error):
            lost = "error: another process of this run has ended"
            return _report(command, lost, _what_is_kept(options), code=1)
        return _report(command, *_explain(error, options), code=1)
    if result.get("nothing_fits"):
        return 3
    if num_failed := int(result.get("num_failed", 0)):
        return _report(command, f"error: {num_failed} cells failed; the table names them", code=1)
    return 0


def _reader_left() -> int:
    """End after the reader of a pipe (head, less), so that Python's flush at exit does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _parse(arguments: list[str]) -> Options:
    kinds = {name: command.options for name, command in _COMMANDS.items()}
    return parsing.parse(arguments, kinds, _DESCRIPTION)


def _run(command: _Command, options: Options) -> dict[str, Any]:
    """Run the handler, print its result and return it."""
    said = written.values(options)
    as_json, quiet = said.get("json", False), said["quiet"] or not processes.is_main()
    show_bars(not quiet)
    with contextlib.ExitStack() as changed:
        if as_json:
            changed.enter_context(_stdout_to_stderr())
        with _collector_paused():
            if not command.loads_nothing and (quiet or not sys.stderr.isatty()):
                changed.enter_context(without_bars_of_transformers())
            handler = _handler(command)
        result = handler(options)
        processes.stop()
    if not processes.is_main():
        return {}
    if as_json:
        print(json.dumps(plain(result), allow_nan=False, default=str))
    elif isinstance(options, GenerateOptions):
        _print_summary(result, to_stderr=True)  # standard output belongs to the generated text
    elif not command.prints_tables:
        _print_summary(result)
    sys.stdout.flush()
    return result


def _handler(command: _Command) -> Callable[[Options], dict[str, Any]]:
    module, _, function = command.handler.partition(":")
    if command.options is PlanOptions:
        import_bitsandbytes_without_compiler()
    handler: Callable[[Options], dict[str, Any]] = getattr(
        importlib.import_module(f"lowmem_reft.{module}"), function
    )
    return handler


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Import without Python's cycle collector, which takes a third of the time that imports take.

    It would look through the same modules again and again, which stay until the end; afterwards it
    leaves them alone. Where torch is there already, as in a program that calls ``main``, nothing
    changes.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _warnings_in_one_line(command: str) -> Iterator[None]:
    """Write warnings as errors are written, without the line of code that gave them."""

    def written(message: Any, *_: Any, **__: Any) -> str:
        return for_stream(f"lowmem-reft {command}: {_shortened(str(message))}", sys.stderr) + "\n"

    before, warnings.formatwarning = warnings.formatwarning, written
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let a scheduler's SIGTERM end the run as Ctrl-C does: children stopped, one line said."""

    def interrupt(_signum: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send standard output to standard error, also that of native libraries and child processes."""
    sys.stdout.flush()
    real_stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(real_stdout, 1)
        os.close(real_stdout)


def _print_summary(result: dict[str, Any], *, to_stderr: bool = False) -> None:
    """One line per figure or interval; other lists and objects are for ``--json``."""
    from rich.console import Console

    shown = {
        key: value
        for key, value in result.items()
        if isinstance(value, str | int | float | Path) or key.endswith("_interval")
    }
    width = max(map(len, shown), default=0)
    console = Console(stderr=to_stderr, soft_wrap=True)
    for key, value in shown.items():
        console.print(harmless(f"{key:<{width}}  {_format(key, value)}"), markup=False)


def _format(key: str, value: Any) -> str:
    if key.endswith("_interval"):
        return " to ".join(f"{end:.4g}" for end in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if key.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _what_is_kept(options: Options) -> str:
    if isinstance(options, CompareOptions):
        return f"finished cells in {options.output_dir} are kept; the same command runs the rest"
    if isinstance(options, SweepOptions):
        return f"finished trials in {options.output_dir} are kept; the same command goes on"
    if isinstance(options, ReuseCommandOptions):
        return (
            "what is gone is whole again when training builds it; the same command removes the rest"
        )
    if isinstance(options, GenerateOptions) and options.output is not None:
        return f"answers in {options.output} are kept; the same command goes on from there"
    if not isinstance(options, TrainOptions):
        return "nothing was changed but the output file, if one was named"
    directory = options.run.output_dir
    if any(directory.glob("checkpoint-*")):
        return f"checkpoints in {directory} are kept; add --resume to go on from the last one"
    kept = f"no checkpoint had been written to {directory}; --save-steps N writes one every N steps"
    stores = options.reuse.reuse_dir or directory / "reuse"
    if any(stores.glob("*/manifest.json")):
        kept += f"; what is constant is kept in {stores}, and the same command goes on with it"
    return kept


def _explain(error: Exception, options: Options) -> tuple[str, str]:
    """What went wrong and what to do, for a failure that is not simply bad input."""
    message = str(error) or type(error).__name__
    if is_out_of_memory(error):
        return f"error: out of memory: {message}", _advice(options)
    if is_full_disk(error):
        return f"error: the disk is full: {message}", "free some space and run the command again"
    return (
        f"error: {type(error).__name__}: {message}",
        "set LOWMEM_REFT_DEBUG=1 in the environment for the traceback",
    )


def _advice(options: Options) -> str:
    """Return what to do about too little memory: of a training, the setting that would fit."""
    found = None
    if isinstance(options, TrainOptions):
        fitting = importlib.import_module("lowmem_reft.runs.fitting")
        found = fitting.setting_that_fits(options)
    return _OUT_OF_MEMORY_ADVICE if found is None else f"this would fit: {found}"


def _wrong_path(error: Exception) -> str:
    """Name the path that an error of the system is about."""
    assert isinstance(error, OSError)
    return (
        f"{os.fspath(error.filename)!r} must be a path that can be used here, got "
        f"{(error.strerror or type(error).__name__).lower()!r}; check it, or choose another"
    )


def _shortened(line: str) -> str:
    """Put a message on one line; texts of libraries and of users in it may be long."""
    line = " ".join(line.split())
    half = _MOST_CHARACTERS // 2
    return line if len(line) <= 2 * half else f"{line[:half]} ... {line[-half:]}"


def _report(command: str, *lines: str, code: int) -> int:
    if not processes.is_main():
        if code == 130:
            return code
        # What the first process says as well is said once: this one is ended meanwhile.
        time.sleep(_LAUNCHER_ENDS_ALL_S)
        lines = tuple(f"process {processes.process_index()}: {line}" for line in lines)
    if code == 130:
        print(file=sys.stderr)  # ends the line of a progress bar
    elif sys.exc_info()[0] is not None and os.environ.get("LOWMEM_REFT_DEBUG") == "1":
        traceback.print_exc()
    for line in lines:
        text = for_stream(_shortened(line), sys.stderr)
        print(f"lowmem-reft {command}: {text}", file=sys.stderr)
    return code
