"""Options of the subcommands that train, score and answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import tyro

from lowmem_reft.errors import InputError, check_counts, check_not_negative
from lowmem_reft.options.groups import (
    DataOptions,
    ForgettingOptions,
    HeldOutOptions,
    MemoryOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    PromptOptions,
    ReuseOptions,
    RunOptions,
    ScoringOptions,
)
from lowmem_reft.options.values import Switches, TaskType, check_seed, check_template
from lowmem_reft.options.written import given


@dataclass(frozen=True, kw_only=True)
class ChoosingOptions:
    """When validation rows are scored, and when that ends the training."""

    eval_steps: int | None = None
    """Optimizer steps between scores of --validation-data; default: one after every epoch. The last
    step is scored as well, and the adapter of the best one is kept."""
    patience: Annotated[int | None, tyro.conf.arg(aliases=("--early-stopping-patience",))] = None
    """Stop after so many scores of --validation-data in a row that were no better than the best."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(eval_steps=self.eval_steps, patience=self.patience)


@dataclass(frozen=True, kw_only=True)
class HubOptions:
    """Where the adapter is shared."""

    push_to_hub: str | None = None
    """Repository of the Hugging Face hub for the adapter and its README.md, made before the
    training if it is not there, and pushed to after it."""
    hub_private_repo: bool = True
    """Whether a repository that is made is private (the default) or public; one that is there stays
    what it is."""

    def __post_init__(self) -> None:
        """Check that there is something to make public."""
        if not self.hub_private_repo and self.push_to_hub is None:
            raise InputError(
                "hub_private_repo must come with push_to_hub, got False alone; add --push-to-hub "
                "USER/NAME"
            )


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fine-tune one adapter on a frozen base."""

    model: ModelOptions
    data: DataOptions
    prompts: PromptOptions = field(default_factory=PromptOptions)
    held_out: HeldOutOptions = field(default_factory=HeldOutOptions)
    choosing: ChoosingOptions = field(default_factory=ChoosingOptions)
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
    run: RunOptions
    hub: HubOptions = field(default_factory=HubOptions)

    def __post_init__(self) -> None:
        """Check that there is something to choose by."""
        for name, value in given(self.choosing).items():
            if self.held_out.validation_data is None:
                raise InputError(
                    f"{name} must come with validation_data, got {value} alone; add "
                    "--validation-data FILE"
                )


@dataclass(frozen=True, kw_only=True)
class ShownDataOptions(DataOptions):
    """The rows to show."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """JSONL, JSON, CSV or Parquet file, or a datasets id; or several, as in train."""


@dataclass(frozen=True, kw_only=True)
class ShowOptions(Switches):
    """Show rows as the tokens that training takes, and what a data file holds; no weights are read.

    Edited, supervised and end tokens are marked, and in colour on a terminal.
    """

    data: ShownDataOptions
    prompts: PromptOptions = field(default_factory=PromptOptions)
    model: str
    """Hub id or local directory of the base, whose tokenizer and config.json are read."""
    task_type: TaskType = "CAUSAL_LM"
    """CAUSAL_LM, or SEQ_CLS for a classification head on {"text", "label"} rows."""
    positions: str | None = None
    """Tokens that are edited: f7+l7, f3, l1 or all of the prompt, response, l1+response, every;
    default: those of train."""
    num: int = 5
    """Rows to show; the figures are those of all."""

    def __post_init__(self) -> None:
        """Check the count."""
        check_not_negative(num=self.num)


@dataclass(frozen=True, kw_only=True)
class ScoredDataOptions(DataOptions):
    """The rows to score."""

    data: str = ""
    """JSONL, JSON, CSV or Parquet file, or a datasets id. Not with --lm-eval, whose tasks have
    rows."""


@dataclass(frozen=True, kw_only=True)
class ScoredPromptOptions(PromptOptions):
    """How rows become prompts, and what is put before these."""

    examples: str | None = None
    """Rows like those of --data that are put before each prompt as solved examples, in their order:
    all of this file. They are written as in training; of chats they are earlier turns. Where they
    do not fit in --max-length, the first are left out and the prompts counted. Not with
    --adapter."""


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """What EleutherAI's lm-eval scores (pip install 'lowmem-reft[eval]')."""

    lm_eval: str | None = None
    """Comma-separated tasks or groups of lm-eval to score instead of --data. They write their own
    prompts; the adapter edits these, not the answers. --limit is then per task."""
    include_path: Path | None = None
    """Directory with further lm-eval tasks (YAML), yours for example."""
    num_fewshot: int | None = None
    """Solved examples before each question; default: as each task says."""
    apply_chat_template: bool = False
    """Write the tasks' prompts with the tokenizer's chat template."""

    def __post_init__(self) -> None:
        """Check that tasks are named, and that the harness is installed."""
        if self.lm_eval is None:
            for name, value in given(self).items():
                raise InputError(
                    f"{name} must come with lm_eval, got {value} alone; add --lm-eval TASKS"
                )
            return
        if self.num_fewshot is not None:
            check_not_negative(num_fewshot=self.num_fewshot)
        if self.include_path is not None and not self.include_path.is_dir():
            raise InputError(
                f"include_path must be a directory, got {str(self.include_path)!r}; give the one "
                "that holds the tasks"
            )
        if find_spec("lm_eval") is None:
            raise InputError(
                f"lm_eval must be installed to score its tasks, got {self.lm_eval!r} without it; "
                "pip install 'lowmem-reft[eval]'"
            )


@dataclass(frozen=True, kw_only=True)
class BesideOptions(ForgettingOptions):
    """What is scored beside the rows: general text, and a base stored as in the training."""

    only_given_storage: bool = False
    """Where --storage is not that of the training: score on it alone, not on both in turn."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(Switches):
    """Score a base with or without an adapter: accuracy by choice likelihood or by generation."""

    model: ModelOptions
    data: DataOptions = field(default_factory=ScoredDataOptions)
    prompts: ScoredPromptOptions = field(default_factory=ScoredPromptOptions)
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    adapter: Path | None = None
    """Adapter directory, that of its run or of its cell in a comparison; without it the base itself
    is scored."""
    beside: BesideOptions = field(default_factory=BesideOptions)
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    batch_size: int = 16
    """Sequences per forward pass."""
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
    predictions: Path | None = None
    """Write one JSON line per example here."""

    def __post_init__(self) -> None:
        """Check the count, and that it is said what to score."""
        check_counts(batch_size=self.batch_size)
        tasks = self.harness.lm_eval
        if bool(self.data.data) == bool(tasks):
            raise InputError(
                f"data must be given, or lm_eval, and not both, got {self.data.data!r} and "
                f"{tasks!r}; for example --data test.jsonl"
            )
        if self.prompts.examples is not None and self.adapter is not None:
            raise InputError(
                f"examples must be left out with adapter, got {self.prompts.examples!r}: it was "
                "trained on prompts without any; score the base with them"
            )
        if self.prompts.examples is not None and self.model.task_type == "SEQ_CLS":
            raise InputError(
                f"examples must be left out with task_type SEQ_CLS, got {self.prompts.examples!r}: "
                "a classification head reads no solved examples"
            )
        if tasks:
            self._check_nothing_is_ignored()
        elif self.reuse.dequantize_upper == "on":
            raise InputError(
                "dequantize_upper must be auto or off in evaluate, got 'on'; it is for training"
            )

    def _check_nothing_is_ignored(self) -> None:
        """Refuse what the harness decides itself."""
        ignored = given(self.data) | given(self.prompts) | given(self.scoring) | given(self.reuse)
        ignored |= given(self.beside)
        ignored = {name: ignored[name] for name in ignored if name not in ("data", "limit")}
        if ignored:
            raise InputError(
                f"{', '.join(ignored)} must be left out with lm_eval, got "
                f"{', '.join(map(str, ignored.values()))}; its tasks write and score their rows"
            )


LOWEST_TEMPERATURE = 0.001
"""Below it, logits divided by the temperature are no numbers any more."""


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How new tokens are chosen, and when there are enough."""

    max_new_tokens: int = 128
    """Tokens generated per prompt."""
    temperature: float = 0.0
    """0 is greedy decoding; above it tokens are drawn."""
    top_p: float = 1.0
    """Draw among the most probable tokens that have this much probability together."""
    stop: tuple[str, ...] = ()
    """Texts at which an answer ends, and which are left out of it; "\\n" is a new line. Without
    one, answers of an adapter also end at the choices that all its training rows had."""
    seed: int = 0
    """Seed of the sampling; what is drawn also depends on the batch size."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_counts(max_new_tokens=self.max_new_tokens)
        check_not_negative(temperature=self.temperature)
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise InputError(
                f"temperature must be 0 or at least {LOWEST_TEMPERATURE:g}, got "
                f"{self.temperature!r}; 0 is greedy"
            )
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p!r}; 1 is off")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError(
                f"top_p must be 1 where nothing is drawn, got {self.top_p!r}; raise temperature"
            )
        if "" in self.stop:
            raise InputError(f"stop must be texts that are not empty, got {self.stop!r}; change it")
        check_seed(self.seed)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """What ``stop`` means: with line breaks for each backslash and n."""
        return tuple(text.replace("\\n", "\n") for text in self.stop)


@dataclass(frozen=True, kw_only=True)
class AskingOptions:
    """How prompts are written."""

    template: str | None = None
    """How a prompt is written, or chat: as the user's message, by the tokenizer's chat template.
    Default: as in each adapter's training; of the base alone chat if its tokenizer has a chat
    template, else "{prompt}"."""
    raw: bool = False
    """Write prompts as they are, also where the tokenizer has a chat template."""

    def __post_init__(self) -> None:
        """Check the template."""
        check_template(self.template)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Switches):
    """Continue prompts from a file, or one prompt, with a base and one or several adapters."""

    model: ModelOptions
    adapter: str | None = None
    """Adapter directory, that of its run or of its cell in a comparison, or several with commas
    between them: each answers every prompt, and so does the base where __base__ is among them.
    Without it the base alone answers."""
    input: Path | None = None
    """JSONL file with {"prompt"} or {"messages"} rows."""
    prompt: str | None = None
    """One prompt instead of a file."""
    output: Path | None = None
    """JSONL file to write; default: standard output. One that is there is completed: the same
    command goes on where it was interrupted."""
    overwrite: bool = False
    """Write --output anew, whatever is there."""
    asking: AskingOptions = field(default_factory=AskingOptions)
    max_length: int | None = None
    """Tokens of the prompt; longer ones are cut as in training, and counted. Default: the adapter's
    own, else 512."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    batch_size: int = 8
    """Prompts per forward pass (left-padded), of several adapters together."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(batch_size=self.batch_size, max_length=self.max_length)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk to a base and its adapters in the terminal; /help says how."""

    model: ModelOptions
    adapter: str | None = None
    """Adapter directory, or several with commas between them; the first one answers until
    /adapter NAME chooses another. Without it the base answers."""
    system: str | None = None
    """System message of the chat."""
    asking: AskingOptions = field(default_factory=AskingOptions)
    max_length: int | None = None
    """Tokens of the conversation before an answer; the oldest messages that do not fit are left
    out. Default: as many as the model has positions for."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    quiet: bool = False
    """Say nothing but the answers."""

    def __post_init__(self) -> None:
        """Check the count."""
        check_counts(max_length=self.max_length)


@dataclass(frozen=True, kw_only=True)
class UiOptions:
    """Serve a page to train, compare and talk from, in the browser of this machine alone.

    It needs Gradio: pip install 'lowmem-reft[ui]'. Ctrl-C ends it, and what was started from it.
    """

    port: int = 7860
    """Port on 127.0.0.1."""
    no_browser: bool = False
    """Only print the address; open no browser."""
    quiet: bool = False
    """Do not print the address either."""

    def __post_init__(self) -> None:
        """Check that there is such a port."""
        if not 0 < self.port < 2**16:
            raise InputError(f"port must be from 1 to 65535, got {self.port}; choose another")
