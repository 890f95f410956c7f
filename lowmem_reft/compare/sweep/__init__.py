"""The search for settings: trials on validation rows, and the command that scores the best on test.

Each method is searched on its own, with as many trials as the others, so that a comparison of the
best settings is fair. A trial is a cell (``cell.py``) in its own process; the scores of its epochs
are followed while it runs, and it is stopped when they are below the median of the others.
``sweep.json`` holds every trial; the same command goes on from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lowmem_reft.compare.cells import build_cells, command_line
from lowmem_reft.compare.engines.launch import CHILD_COMMAND
from lowmem_reft.compare.outputs import check_comparison
from lowmem_reft.compare.report.console import Progress
from lowmem_reft.compare.sources import Sources
from lowmem_reft.compare.sweep.best import best_of, remark
from lowmem_reft.compare.sweep.console import Told, print_trials
from lowmem_reft.compare.sweep.rows import find_rows
from lowmem_reft.compare.sweep.runner import Task, run_trials
from lowmem_reft.compare.sweep.search import Search, Trial, read_trial
from lowmem_reft.compare.sweep.space import Space, grid, parse_space, size
from lowmem_reft.errors import InputError, naming
from lowmem_reft.machine.files import parse_json, write_json
from lowmem_reft.machine.locks import alone
from lowmem_reft.machine.run_files import write_run_file
from lowmem_reft.methods.entries import MethodSpec, parse_methods
from lowmem_reft.options import CompareOptions, SweepOptions

TEST_SEEDS = "0,1,2"
"""Of the comparison that is proposed."""

FILE_NAME = "sweep.json"

Sampler = Literal["grid", "random", "tpe"]


def run_sweep(
    options: SweepOptions, *, child_command: Sequence[str] = CHILD_COMMAND
) -> dict[str, Any]:
    """Search the space for every method and write ``sweep.json``; the test rows are never read.

    Args:
        options: What to search; trials in ``options.output_dir`` that ended are not run again.
        child_command: Replaces the process that runs a trial.

    Returns:
        ``output_dir``, ``sweep`` (path), ``num_trials``, ``num_complete``, ``num_pruned``,
        ``num_failed``, ``metric``, ``best`` (a row per method), ``methods`` (the best settings as
        ``--methods``, None if a method has none) and ``command``, which scores them on test rows.

    Raises:
        InputError: The space, the methods, the rows or the model are wrong, or Optuna is missing.
    """
    check_comparison(options)
    with naming("methods"):
        specs = parse_methods(options.search.methods)
    spaces = parse_space(options.search.space, specs)
    sampler = choose_sampler(options, spaces)
    trials, sources, final = find_rows(options)
    path = options.output_dir / FILE_NAME
    with alone(options.output_dir, options.output_dir / ".lock"):
        write_run_file(options.output_dir, "sweep", options)
        known = _read(path)
        tasks = [
            _task(options, sampler, trials, sources, spec, space, known)
            for spec, space in zip(specs, spaces, strict=True)
        ]
        save = partial(_save, options, tasks, final)
        with Progress(sum(len(task.trials) for task in tasks), quiet=options.quiet) as progress:
            run_trials(
                tasks,
                workers=options.workers,
                child_command=child_command,
                observer=Told(progress),
                save=save,
            )
        content = save(finished=True)
    if not options.quiet:
        print_trials(content)
    ended = [trial.state for task in tasks for trial in task.trials]
    return {
        "output_dir": str(options.output_dir),
        "sweep": str(path),
        "num_trials": len(ended),
        **{f"num_{state}": ended.count(state) for state in ("complete", "pruned", "failed")},
        **{name: content[name] for name in ("metric", "best", "methods", "command")},
    }


def choose_sampler(options: SweepOptions, spaces: Sequence[Space]) -> Sampler:
    """How settings are drawn: all of them if they can be counted and no number is given.

    Raises:
        InputError: The number of trials is missing, or must not be given.
    """
    countable = all(size(space) is not None for space in spaces)
    sampler = options.search.sampler
    if sampler == "auto":
        sampler = "grid" if countable and options.search.trials is None else "tpe"
    if sampler == "grid":
        if not countable:
            raise InputError(
                "sampler must be random or tpe for a space with ranges, got 'grid'; or write lists"
            )
        if options.search.trials is not None:
            raise InputError(
                "trials must be left out with sampler grid, got "
                f"{options.search.trials!r}; a grid is tried as a whole"
            )
    elif options.search.trials is None:
        raise InputError(
            "trials must be given where not every setting is tried, got None; for example "
            "--trials 20"
        )
    return sampler


def _task(
    options: SweepOptions,
    sampler: Sampler,
    comparison: CompareOptions,
    sources: Sources,
    spec: MethodSpec,
    space: Space,
    known: dict[str, list[Trial]],
) -> Task:
    """The trials of one method, those that ended before taken over."""

    def cell_of(specs: Sequence[MethodSpec]) -> Any:
        cells = build_cells(comparison, specs, [options.search.seed], sources)
        return next(cell for cell in cells if cell.train is not None)

    identity = {
        "config": cell_of([spec]).record["key"],
        "space": [{"kind": type(part).__name__, **asdict(part)} for part in space],
        "sampler": sampler,
        "prune": options.search.prune,
        "seed": options.search.seed,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    search = Search(
        space,
        sampler=sampler,
        seed=options.search.seed,
        prune=options.search.prune == "median",
        metric=sources.scoring.metric,
    )
    if sampler == "grid":
        given: Sequence[dict[str, Any] | None] = list(grid(space))
    else:
        given = [None] * (options.search.trials or 0)
    before = {trial.number: trial for trial in known.get(key, [])}
    trials = [
        before.get(number, Trial(number=number, drawn=drawn)) for number, drawn in enumerate(given)
    ]
    # Trials beyond a number that has become smaller were run: they count.
    trials += [trial for number, trial in sorted(before.items()) if number >= len(given)]
    return Task(key=key, spec=spec, search=search, trials=trials, cell_of=cell_of)


def _read(path: Path) -> dict[str, list[Trial]]:
    """The trials that are written down, by the key of their search; unfinished ones wait again."""
    try:
        searches = parse_json(path.read_bytes())["searches"]
        return {
            search["key"]: [_ended_or_new(read_trial(trial)) for trial in search["trials"]]
            for search in searches
        }
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"output_dir must hold a sweep.json that is whole, got {str(path)!r} ({error}); "
            "delete it, or choose another directory"
        ) from error


def _ended_or_new(trial: Trial) -> Trial:
    return trial if trial.ended else Trial(number=trial.number, drawn=trial.drawn)


def _save(
    options: SweepOptions, tasks: Sequence[Task], final: CompareOptions, *, finished: bool = False
) -> dict[str, Any]:
    """Write ``sweep.json``; ``finished``: with what only the whole search tells."""
    found = [(task, best_of(task.trials)) for task in tasks]
    best = [(task, trial) for task, trial in found if trial is not None]
    methods = ",".join(trial.method for _, trial in best)
    content = {
        "space": options.search.space,
        "seed": options.search.seed,
        "metric": best[0][1].metric if best else None,
        "methods": methods or None,
        "command": command_line(final, methods, TEST_SEEDS) if methods else None,
        "best": [
            {
                "searched": task.spec.label,
                **{n: getattr(trial, n) for n in ("method", "value", "loss", "settings")},
                "remark": remark(task.trials, trial),
            }
            for task, trial in best
        ],
        "searches": [
            {
                "method": task.spec.label,
                "key": task.key,
                "best": None if trial is None else trial.number,
                "importance": task.search.importance() if finished else None,
                "trials": [asdict(trial) for trial in task.trials if trial.state != "waiting"],
            }
            for task, trial in found
        ],
    }
    write_json(options.output_dir / FILE_NAME, content)
    return content
