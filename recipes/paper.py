"""What the recipes of the ReFT paper's tables share: settings, and the paper's rows beside ours.

The paper is Wu et al. 2024, https://arxiv.org/abs/2404.03592. Its rows stand in the recipe of each
table; those of other papers are marked there as quoted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowmem_reft.compare import run_comparison
from lowmem_reft.errors import InputError
from lowmem_reft.methods import parse_methods
from lowmem_reft.methods.entries import write_entry
from lowmem_reft.options import (
    CompareOptions,
    MemoryOptions,
    OptimOptions,
    ScoringOptions,
    Storage,
    Workers,
    written,
)

_WIDE = 150


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """What every recipe takes."""

    json: bool = False
    """Print the result as one JSON object on standard output, after the tables."""


AnyConfig = TypeVar("AnyConfig", bound=RecipeConfig)


@dataclass(frozen=True, kw_only=True)
class PaperConfig(RecipeConfig):
    """What every recipe of a table of the paper takes."""

    model: str
    """Hub id or directory of the base."""
    small: bool = False
    """The table at the size of a base of 20 to 200 million parameters: a few hundred rows, short
    prompts, few epochs and one seed, for minutes on a processor."""
    data_dir: Path | None = None
    """Directory with the public files (see lowmem-reft tasks); default: their hub ids."""
    methods: str | None = None
    """Methods as compare --methods takes them; default: the recipe's own."""
    seeds: str | None = None
    """Comma-separated; default: the paper's, or one with --small."""
    epochs: float | None = None
    """Passes over the data; default: the methods' own."""
    storage: Storage | None = None
    """How the frozen base is stored; default: the methods' own, nf4. The paper's is 16 bit."""
    limit: int | None = None
    """At most N rows to train on, to choose the epoch by and to score, each."""
    memory_gib: float | None = None
    """Fit the training into this much memory: see train --memory-gib."""
    workers: Workers = 1
    """Cells that run at the same time, or ray."""
    output_dir: Path = Path("paper-results")
    """Cells, results and report; finished cells there are not run again."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a table is repeated with where the user says nothing else."""

    methods: str
    """As compare --methods takes them."""
    tasks: str
    """Sets to score."""
    train_task: str | None = None
    """One training for all of them; None trains on each."""
    seeds: str = "42,43,44"
    """The paper's, unless they are others."""
    num_train: int | None = None
    """Rows to train on; None takes all, as for the next two."""
    num_validation: int | None = None
    """Rows to choose the epoch by."""
    num_scored: int | None = None
    """Test rows."""
    max_length: int = 512
    """Tokens of prompt and response."""
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    """How rows are scored."""
    optim: OptimOptions
    """Of the methods that bring no settings of their own."""

    def note(self, paper: str) -> str:
        """Say that the rows below are of another base and size than the paper's, if they are."""
        if self.num_train is None:
            return paper
        return (
            f"{paper} --small: another base, {self.num_train} rows to train on, "
            f"{self.optim.epochs:g} epochs, {self.num_scored} test rows and one seed; what the "
            "paper's rows are of is many times as large, so that only the columns compare."
        )


def run_recipe(
    config: type[AnyConfig], main: Callable[[AnyConfig], dict[str, Any]], about: str | None
) -> None:
    """Run a recipe from the command line: tables on standard error, JSON where it is asked for."""
    try:
        chosen = tyro.cli(config, description=about, config=(tyro.conf.DisallowNone,))
        result = main(chosen)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if chosen.json:
        print(json.dumps(result, indent=2))


def compare(config: PaperConfig, setting: Setting, **changes: Any) -> dict[str, Any]:
    """Run a recipe's comparison.

    Args:
        config: What the user chose.
        setting: The recipe's own, where the user chose nothing.
        changes: What the experiment sets of ``CompareOptions``, by the names of its flags.

    Raises:
        InputError: An option, a method, the model or a file is wrong.
    """
    sizes = (setting.num_train, setting.num_validation, setting.num_scored)
    limits = [_smaller(size, config.limit) for size in sizes]
    options: dict[str, Any] = {
        "model": config.model,
        "data_dir": config.data_dir,
        "methods": with_overrides(
            config.methods or setting.methods, epochs=config.epochs, storage=config.storage
        ),
        "seeds": config.seeds or setting.seeds,
        **dict(zip(("limit", "validation_limit", "eval_limit"), limits, strict=True)),
        "max_length": setting.max_length,
        "scoring": setting.scoring,
        "optim": setting.optim,
        "memory": MemoryOptions(memory_gib=config.memory_gib),
        "workers": config.workers,
        "output_dir": config.output_dir,
    }
    return run_comparison(written.build(CompareOptions, **{**options, **changes}))


def _smaller(size: int | None, limit: int | None) -> int | None:
    return min((number for number in (size, limit) if number is not None), default=None)


def with_overrides(methods: str, **values: object) -> str:
    """Write overrides into every entry of ``methods``, in place of its own; None changes nothing.

    Raises:
        InputError: A method or an override is wrong.
    """
    given = {name: value for name, value in values.items() if value is not None}
    entries = []
    for spec in parse_methods(methods):
        own = spec.label.partition("[")[2].rstrip("]").split(",")
        kept = {name: value for name, _, value in (item.partition("=") for item in own) if name}
        kept = {name: value for name, value in kept.items() if name.strip() not in given}
        entries.append(write_entry(spec.name, {**kept, **given}))
    return ",".join(entries)


@dataclass(frozen=True)
class PaperRow:
    """A row of a table of the paper, in %; None where the paper gives no figure."""

    model: str
    method: str
    params_percent: float | None
    values: tuple[float | None, ...]
    mean: float | None


def read_rows(text: str) -> tuple[PaperRow, ...]:
    """Read lines ``model | method | trained parameters % | value per task | mean``; "-" is none."""
    rows = []
    for line in text.strip().splitlines():
        model, method, params, values, mean = (part.strip() for part in line.split("|"))
        numbers = tuple(_number(word) for word in values.split())
        rows.append(PaperRow(model, method, _number(params), numbers, _number(mean)))
    return tuple(rows)


def rows_of_model(rows: Sequence[PaperRow], model: str) -> list[PaperRow]:
    """Return the paper's rows of the model that a hub id or directory is named after, else all."""
    name = _plain(Path(model).name)
    return [row for row in rows if _plain(row.model) in name] or list(rows)


def print_tasks(
    title: str,
    tasks: Mapping[str, str],
    paper: Sequence[PaperRow],
    measured: Sequence[Mapping[str, Any]],
    *,
    model: str,
    note: str,
) -> None:
    """Print a table with a column per task: the paper's rows, then those of ``run_comparison``.

    Args:
        title: Above the table.
        tasks: Name in the registry to heading, in the order of the paper's values.
        paper: The paper's rows; only those of the same model, if it is one of the paper's.
        measured: A row per method and task, with means over seeds.
        model: What was trained.
        note: Below the table.
    """
    quoted = [
        [
            *(row.model, row.method, decimals(row.params_percent, 3)),
            *(decimals(value) for value in row.values),
            decimals(row.mean),
        ]
        for row in rows_of_model(paper, model)
    ]
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in measured:
        found.setdefault(row["method"], {})[row["task"]] = row
    ours = []
    for method, by_task in found.items():
        values = [percent(by_task.get(task)) for task in tasks]
        known = [value for value in values if value is not None]
        ours.append(
            [
                *(Path(model).name, method, trained_percent(by_task.values())),
                *(decimals(value) for value in values),
                decimals(sum(known) / len(known) if len(known) == len(values) else None),
            ]
        )
    print_table(title, [*tasks.values(), "avg"], quoted, ours, note=note)


def print_table(
    title: str,
    headings: Sequence[str],
    paper: Sequence[Sequence[str]],
    measured: Sequence[Sequence[str]],
    *,
    note: str,
) -> None:
    """Print the paper's rows and below them ours; model, method and parameters come first."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold")
    table.add_column("method", overflow="fold", min_width=10)
    for heading in ("params %", *headings):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    table.add_row("paper", style="dim")
    for row in paper:
        table.add_row(*map(escape, row))
    table.add_section()
    table.add_row("measured here", style="dim")
    for row in measured:
        table.add_row(*map(escape, row))
    console = open_console()
    console.print(table)
    console.print(note, markup=False)


def open_console() -> Console:
    """Return the terminal on standard error; a log file is as wide as the tables."""
    console = Console(stderr=True, soft_wrap=False, highlight=False)
    if not console.is_terminal:
        console.width = _WIDE
    return console


def percent(row: Mapping[str, Any] | None) -> float | None:
    """Return the score of a row of ``run_comparison`` in %; None if there is none."""
    return None if row is None or row["value_mean"] is None else 100 * float(row["value_mean"])


def trained_percent(rows: Iterable[Mapping[str, Any]], digits: int = 3) -> str:
    """Return the trained share of a method's rows in %; a dash where nothing was trained."""
    shares = [row["trainable_percent"] for row in rows if row["trainable_percent"]]
    return decimals(max(shares, default=None), digits)


def decimals(value: float | None, digits: int = 1) -> str:
    """Return a figure as it is shown; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def _number(word: str) -> float | None:
    return None if word == "-" else float(word)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
