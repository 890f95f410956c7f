"""Options of the subcommands that put methods and settings side by side."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.options.groups import MemoryOptions, OptimOptions, ReuseOptions, ScoringOptions
from lowmem_reft.options.values import (
    ComputeDtype,
    Storage,
    TaskType,
    Workers,
    check_directory,
    check_seed,
)


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Train and score every method with every seed, each in its own process."""

    model: str | None = None
    """Hub id or local directory; default: the tiny model that the package ships."""
    task_type: TaskType = "CAUSAL_LM"
    """CAUSAL_LM, or SEQ_CLS for a classification head."""
    tasks: str | None = None
    """Comma-separated names that lowmem-reft tasks lists: rows, prompts, metrics and splits are
    the task's own, and each adapter is that of its best epoch on the task's validation rows."""
    train_task: str | None = None
    """Train on this task's rows (commonsense170k, math10k, ...): each adapter once, to be scored on
    all of --tasks."""
    data_dir: Path | None = None
    """Directory with the files of --tasks; default: their hub ids."""
    data: str | None = None
    """Training rows (see train --data); default: the small task that the package ships."""
    validation_data: str | None = None
    """Rows to choose the best epoch by; default with --data: the last epoch is kept."""
    eval_data: str | None = None
    """Rows to score; default with --data: a fixed tenth of the training rows, held out."""
    split: str = "train"
    """Split of --data where that is a datasets id."""
    validation_split: str = "validation"
    """Split of --validation-data where that is a datasets id."""
    eval_split: str = "test"
    """Split of --eval-data where that is a datasets id."""
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    methods: str | None = None
    """Comma-separated names, with overrides in brackets: loreft[rank=8,positions=l1].
    Default: loreft,loreft[storage=bf16],lora,qlora; all: the whole table of methods. With the tiny
    model that the package ships, names alone take the settings that suit it."""
    equal: Literal["params", "memory", "time"] | None = None
    """Give every method what the reference gets: params: as many trained parameters (by its rank,
    virtual tokens or layers); memory: no more predicted memory (by splitting the batch and saving
    memory as --memory-gib does); time: as many steps as take as long, by a short timed run each."""
    budget_reference: str | None = None
    """Method that sets the budget of --equal, written as in --methods; default: the first."""
    seeds: str = "0"
    """Comma-separated seeds."""
    output_dir: Path = Path("compare-results")
    """Where cells, results.json, results.csv, plots and report.html go; finished cells there are
    not run again."""
    template: str | None = None
    """How a prompt is written; default: "{prompt}"."""
    max_length: int = 512
    """Tokens of prompt + response."""
    limit: int | None = None
    """Use only the first N training rows (of a task: N rows drawn with a fixed seed)."""
    validation_limit: int | None = None
    """Choose the epoch by the first N validation rows only."""
    eval_limit: int | None = None
    """Score only the first N evaluation rows."""
    compute_dtype: ComputeDtype = "auto"
    """Arithmetic of the base."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    optim: OptimOptions = field(default_factory=OptimOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    reuse: ReuseOptions = field(default_factory=lambda: ReuseOptions(reuse="off"))
    workers: Workers = 1
    """Cells that run at the same time, or ray: as many as a Ray cluster has room for (RAY_ADDRESS,
    or the one that runs here, else a new one on this machine)."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(
            workers=None if self.workers == "ray" else self.workers,
            max_length=self.max_length,
            limit=self.limit,
            validation_limit=self.validation_limit,
            eval_limit=self.eval_limit,
        )
        if self.budget_reference is not None and self.equal is None:
            raise InputError(
                f"budget_reference must come with equal, got {self.budget_reference!r} alone; add "
                "--equal params, memory or time"
            )
        if self.train_task is not None and self.tasks is None:
            raise InputError(
                f"train_task must come with tasks, got {self.train_task!r} alone; add --tasks"
            )
        given = [name for name in ("data", "validation_data", "eval_data") if getattr(self, name)]
        if self.tasks is not None and given:
            raise InputError(
                f"tasks must be given without {given[0]}, got both; a task has rows of its own"
            )
        if self.validation_data is not None and self.data is None:
            raise InputError(
                f"validation_data must come with data, got {self.validation_data!r} alone; "
                "add --data"
            )


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write the report of finished comparisons again: several as one, or without their texts."""

    sources: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...")]
    """Output directories of compare, or files like its results.json. A run that several of them
    hold is taken from the last."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Where results.json, results.csv, plots and report.html go."""
    hide_texts: bool = False
    """Leave prompts, answers and what is right out of the page, so that it can be shown to those
    who may not see the data: examples are named by file and line."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """Print no table."""

    def __post_init__(self) -> None:
        """Check that there is something to read and that a directory can be written."""
        if not self.sources:
            raise InputError(
                "sources must name a directory of lowmem-reft compare at least, got none; add one"
            )
        check_directory("output_dir", self.output_dir)


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Let a judge of yours say which of two models responds better, at equal lengths too."""

    first: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FIRST")]
    """Responses: what generate --output writes, or evaluate --predictions by generation."""
    second: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SECOND")]
    """Another model's responses to the same prompts."""
    command: str | None = None
    """A program that judges. It reads JSON lines with prompt, first and second, and writes for each
    {"preferred": "first"}, "second" or "tie", or {"probability": 0.8} that the first is better."""
    model: str | None = None
    """A causal language model that judges: hub id or directory; asked for A or B."""
    storage: Storage = "nf4"
    """How that model is stored."""
    batch_size: int = 8
    """Sequences per forward pass of that model."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        """Check that there is one judge."""
        check_counts(batch_size=self.batch_size)
        if (self.command is None) == (self.model is None):
            given = "neither" if self.command is None else "both"
            raise InputError(
                f"command or model must be given, and one of them, got {given}; name the judge"
            )


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Search settings on validation rows, method by method, and name the best."""

    space: str
    """What is varied: overrides of --methods with a list or a range each, separated by blanks:
    "rank=4,8,16 lr=1e-3..1e-2:log positions=f7+l7,all dropout=0..0.3:0.05". With several methods,
    an option goes to those that take it; qlora.lr=1e-4..1e-3 is for one alone."""
    methods: str = "loreft"
    """Comma-separated names, with what is not varied in brackets: loreft[positions=all]. Each is
    searched on its own, with the same number of trials."""
    trials: int | None = None
    """Settings of each method to try; default: every one, where the space has lists only."""
    sampler: Literal["auto", "grid", "random", "tpe"] = "auto"
    """grid: every setting; random; tpe: near those that were good; auto: grid without --trials,
    else tpe."""
    prune: Literal["median", "none"] = "median"
    """median: stop a trial whose best epoch so far is below the median of the others after as many
    epochs, once five are complete."""
    seed: int = 0
    """Seed of the draws and of every training."""
    model: str | None = None
    """Hub id or local directory; default: the tiny model that the package ships."""
    task_type: TaskType = "CAUSAL_LM"
    """CAUSAL_LM, or SEQ_CLS for a classification head."""
    task: str | None = None
    """A name that lowmem-reft tasks lists: trials train on its training rows and are scored on its
    validation rows."""
    data_dir: Path | None = None
    """Directory with the files of --task; default: its hub id."""
    data: str | None = None
    """Training rows (see train --data); default: the small task that the package ships."""
    validation_data: str | None = None
    """Rows to score trials on; default with --data: a fixed tenth of the training rows."""
    eval_data: str | None = None
    """Test rows for the command that is printed, not read here; default with --data: a fixed tenth
    of the training rows, put aside."""
    split: str = "train"
    """Split of --data where that is a datasets id."""
    validation_split: str = "validation"
    """Split of --validation-data where that is a datasets id."""
    eval_split: str = "test"
    """Split of --eval-data where that is a datasets id."""
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    output_dir: Path = Path("sweep-results")
    """Where trials and sweep.json go; the same command goes on with what is there."""
    template: str | None = None
    """How a prompt is written; default: the task's, else "{prompt}"."""
    max_length: int = 512
    """Tokens of prompt + response."""
    limit: int | None = None
    """Use only the first N training rows (of a task: N rows drawn with a fixed seed)."""
    validation_limit: int | None = None
    """Score only the first N validation rows."""
    compute_dtype: ComputeDtype = "auto"
    """Arithmetic of the base."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    optim: OptimOptions = field(default_factory=OptimOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    reuse: ReuseOptions = field(default_factory=lambda: ReuseOptions(reuse="off"))
    workers: Workers = 1
    """Trials that run at the same time, or ray (see compare --workers)."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        """Check the counts, the seed, and that rows come from one place."""
        check_counts(
            trials=self.trials,
            workers=None if self.workers == "ray" else self.workers,
            max_length=self.max_length,
            limit=self.limit,
            validation_limit=self.validation_limit,
        )
        check_seed(self.seed)
        check_directory("output_dir", self.output_dir)
        for name in ("data", "validation_data", "eval_data"):
            value = getattr(self, name)
            if value is not None and self.task is not None:
                raise InputError(
                    f"task must be given without {name}, got both; a task has rows of its own"
                )
            if value is not None and self.data is None:
                raise InputError(f"{name} must come with data, got {value!r} alone; add --data")


@dataclass(frozen=True, kw_only=True)
class TasksOptions:
    """List the tasks that compare --tasks knows, with their metrics and splits."""

    data_dir: Path | None = None
    """Count the rows of the tasks whose public files are in this directory."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar."""


@dataclass(frozen=True, kw_only=True)
class MethodsOptions:
    """List the methods that --method and --methods know, with their options and defaults."""

    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar (there is none; for scripts that always ask for that)."""
