"""Options of the subcommands that put methods and settings side by side."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.options.groups import (
    ForgettingOptions,
    MemoryOptions,
    OptimOptions,
    PromptOptions,
    ReuseOptions,
    ScoringOptions,
)
from lowmem_reft.options.values import (
    ComputeDtype,
    Storage,
    Switches,
    TaskType,
    Workers,
    check_device,
    check_directory,
    check_seed,
    check_template,
)


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The frozen base, which each method has stored as it needs it."""

    model: str | None = None
    """Hub id or local directory; default: the tiny model that the package ships."""
    task_type: TaskType = "CAUSAL_LM"
    """CAUSAL_LM, or SEQ_CLS for a classification head."""
    compute_dtype: ComputeDtype = "auto"
    """Arithmetic of the base."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        """Check the device's name."""
        check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class RowsOptions:
    """The rows to train on, to choose by and to score, and how they become tokens."""

    data_dir: Path | None = None
    """Directory with the files of the named task or tasks; default: their hub ids."""
    data: str | None = None
    """Training rows (see train --data); default: the small task that the package ships."""
    validation_data: str | None = None
    """Rows to choose by. Default with --data: compare keeps the last epoch of each training, sweep
    scores its trials on a fixed tenth of the training rows."""
    eval_data: str | None = None
    """Test rows, which compare scores and sweep only names in the command that it prints. Default
    with --data: a fixed tenth of the training rows, put aside."""
    split: str = "train"
    """Split of --data where that is a datasets id."""
    validation_split: str = "validation"
    """Split of --validation-data where that is a datasets id."""
    eval_split: str = "test"
    """Split of --eval-data where that is a datasets id."""
    template: str | None = None
    """How a prompt is written (see train --template); default: the named task's, else chat if the
    tokenizer has a chat template, else "{prompt}"."""
    max_length: int = 512
    """Tokens of prompt + response."""
    limit: int | None = None
    """Use only the first N training rows (of a task: N rows drawn with a fixed seed)."""
    validation_limit: int | None = None
    """Choose by the first N validation rows only (of a task: N drawn with a fixed seed)."""
    prompts: PromptOptions = field(default_factory=PromptOptions)

    def __post_init__(self) -> None:
        """Check the counts and the template."""
        check_counts(
            max_length=self.max_length, limit=self.limit, validation_limit=self.validation_limit
        )
        check_template(self.template)

    def check_source(self, **named: str | None) -> None:
        """Refuse rows from two places: a task, by the option that names it, and files of rows.

        Raises:
            InputError: There are both, or files without training rows.
        """
        for option, task in named.items():
            if self.prompts.raw and task is not None:
                raise InputError(
                    f"raw must be left out with {option}, got both; a task has prompts of its own"
                )
        for name in ("data", "validation_data", "eval_data"):
            value = getattr(self, name)
            for option, task in named.items():
                if value is not None and task is not None:
                    raise InputError(
                        f"{option} must be given without {name}, got both; a task has rows of its "
                        "own"
                    )
            if value is not None and self.data is None:
                raise InputError(f"{name} must come with data, got {value!r} alone; add --data")


@dataclass(frozen=True, kw_only=True)
class ScoredOptions:
    """Tasks by name, and how much of what is scored."""

    tasks: str | None = None
    """Comma-separated names that lowmem-reft tasks lists: rows, prompts, metrics and splits are
    the task's own, and each adapter is that of its best epoch on the task's validation rows."""
    train_task: str | None = None
    """Train on this task's rows (commonsense170k, math10k, ...): each adapter once, to be scored on
    all of --tasks."""
    eval_limit: int | None = None
    """Score only the first N evaluation rows (of a task: N drawn with a fixed seed)."""
    few_shot: int | None = None
    """Score the base with N solved training rows before each prompt too, beside the base as it is:
    a row for each storage and seed, which draws them (never validation or test rows; of rows with
    choices each answer alike). Where they do not fit in --max-length, the first are left out."""
    forgetting: ForgettingOptions = field(default_factory=ForgettingOptions)

    def __post_init__(self) -> None:
        """Check the counts, and that there is something to score."""
        check_counts(eval_limit=self.eval_limit, few_shot=self.few_shot)
        if self.train_task is not None and self.tasks is None:
            raise InputError(
                f"train_task must come with tasks, got {self.train_task!r} alone; add --tasks"
            )


@dataclass(frozen=True, kw_only=True)
class MatrixOptions:
    """What is put side by side, with which budgets and seeds."""

    methods: str | None = None
    """Comma-separated names, with overrides in brackets: loreft[rank=8,positions=l1];
    qlora[equal=params] alone gets as many trained parameters as --budget-reference. Default:
    loreft,loreft[storage=bf16],lora,qlora; all: the whole table of methods. With the tiny model
    that the package ships, names alone take the settings that suit it."""
    equal: Literal["params", "memory", "time"] | None = None
    """Give every method what the reference gets: params: as many trained parameters (by its rank,
    virtual tokens or layers); memory: no more predicted memory (by splitting the batch and saving
    memory as --memory-gib does); time: as many steps as take as long, by a short timed run each."""
    budget_reference: str | None = None
    """Method that sets the budget of --equal or [equal=params], written as in --methods; default:
    the first that is not equalized itself."""
    seeds: str = "0"
    """Comma-separated seeds."""
    lr_search: str | None = None
    """Choose each method's learning rate first: comma-separated multiples, for example 0.3,1,3, of
    --lr or of its own. Each is trained with the first seed and scored on validation rows; the best
    is taken for all seeds. An entry with a rate in its brackets keeps it."""
    dry_run: bool = False
    """List the cells that would run and those that are finished, with each method's settings as
    they resolve and the predicted peak of its memory; nothing is run or written."""

    def __post_init__(self) -> None:
        """Check the multiples, and that a reference has something to be one for."""
        self.lr_multiples  # noqa: B018 - which checks them
        has_equal = self.equal is not None or re.search(r"\bequal\s*=", self.methods or "")
        if self.budget_reference is not None and not has_equal:
            raise InputError(
                f"budget_reference must come with equal, got {self.budget_reference!r} alone; add "
                "--equal params, memory or time, or equal=params to an entry"
            )

    @property
    def lr_multiples(self) -> list[float]:
        """The multiples of ``lr_search``; none without it.

        Raises:
            InputError: They are not two or more different positive numbers.
        """
        words = [] if self.lr_search is None else self.lr_search.split(",")
        try:
            found = [float(word) for word in words]
        except ValueError:
            found = [math.nan]
        is_right = all(0 < each < math.inf for each in found) and len(set(found)) == len(words)
        if self.lr_search is not None and (len(found) < 2 or not is_right):
            raise InputError(
                "lr_search must be two or more different positive numbers, got "
                f"{self.lr_search!r}; write for example 0.3,1,3"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class CompareOptions(Switches):
    """Train and score every method with every seed, each in its own process."""

    base: BaseOptions = field(default_factory=BaseOptions)
    rows: RowsOptions = field(default_factory=RowsOptions)
    scored: ScoredOptions = field(default_factory=ScoredOptions)
    matrix: MatrixOptions = field(default_factory=MatrixOptions)
    output_dir: Path = Path("compare-results")
    """Where cells, results.json, results.csv, plots and report.html go; finished cells there are
    not run again."""
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    reuse: ReuseOptions = field(default_factory=lambda: ReuseOptions(reuse="off"))
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    workers: Workers = 1
    """Cells that run at the same time, or ray: as many as a Ray cluster has room for (RAY_ADDRESS,
    or the one that runs here, else a new one on this machine)."""

    def __post_init__(self) -> None:
        """Check the count, the directory, and that rows come from one place."""
        check_counts(workers=None if self.workers == "ray" else self.workers)
        check_directory("output_dir", self.output_dir)
        self.rows.check_source(tasks=self.scored.tasks)
        if self.scored.few_shot is not None and self.base.task_type == "SEQ_CLS":
            raise InputError(
                f"few_shot must be left out with task_type SEQ_CLS, got {self.scored.few_shot!r}: "
                "a classification head reads no solved examples"
            )
        self.scored.forgetting.check_task(self.base.task_type)

    @property
    def is_embedded(self) -> bool:
        """Whether model and task are those that the package ships."""
        return self.base.model is None and self.rows.data is None


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Switches):
    """Write the report of finished comparisons again: several as one, or without their texts."""

    sources: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR ...")]
    """Output directories of compare, or files like its results.json. A run that several of them
    hold is taken from the last."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Where results.json, results.csv, plots and report.html go."""
    hide_texts: bool = False
    """Leave prompts, answers and what is right out of the page, so that it can be shown to those
    who may not see the data: examples are named by file and line."""

    def __post_init__(self) -> None:
        """Check that there is something to read and that a directory can be written."""
        if not self.sources:
            raise InputError(
                "sources must name a directory of lowmem-reft compare at least, got none; add one"
            )
        check_directory("output_dir", self.output_dir)


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(Switches):
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

    def __post_init__(self) -> None:
        """Check that there is one judge."""
        check_counts(batch_size=self.batch_size)
        if (self.command is None) == (self.model is None):
            given = "neither" if self.command is None else "both"
            raise InputError(
                f"command or model must be given, and one of them, got {given}; name the judge"
            )
        if self.command is not None and not self.command.strip():
            raise InputError(
                f"command must be a program with its arguments, got {self.command!r}; name one"
            )


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What is searched, and how."""

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
    """median: stop a trial whose best epoch so far is worse than the median of the others after as
    many epochs, once five are complete."""
    seed: int = 0
    """Seed of the draws and of every training."""

    def __post_init__(self) -> None:
        """Check the count and the seed."""
        check_counts(trials=self.trials)
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Switches):
    """Search settings on validation rows, method by method, and name the best."""

    search: SearchOptions
    base: BaseOptions = field(default_factory=BaseOptions)
    task: str | None = None
    """A name that lowmem-reft tasks lists: trials train on its training rows and are scored on its
    validation rows."""
    rows: RowsOptions = field(default_factory=RowsOptions)
    output_dir: Path = Path("sweep-results")
    """Where trials and sweep.json go; the same command goes on with what is there."""
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    reuse: ReuseOptions = field(default_factory=lambda: ReuseOptions(reuse="off"))
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    workers: Workers = 1
    """Trials that run at the same time, or ray (see compare --workers)."""

    def __post_init__(self) -> None:
        """Check the count, the directory, and that rows come from one place."""
        check_counts(workers=None if self.workers == "ray" else self.workers)
        check_directory("output_dir", self.output_dir)
        self.rows.check_source(task=self.task)


@dataclass(frozen=True, kw_only=True)
class TasksOptions(Switches):
    """List the tasks that compare --tasks knows, with their metrics and splits."""

    data_dir: Path | None = None
    """Count the rows of the tasks whose public files are in this directory."""


@dataclass(frozen=True, kw_only=True)
class MethodsOptions(Switches):
    """List the methods that --method and --methods know, with their options and defaults."""
