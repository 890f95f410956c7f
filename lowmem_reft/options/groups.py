"""Groups of options that several subcommands share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowmem_reft.errors import (
    MOST_OF_A_STEP,
    InputError,
    check_at_most,
    check_counts,
    check_not_negative,
    check_positive,
)
from lowmem_reft.options.values import (
    OPTIMIZERS,
    SCHEDULES,
    Component,
    ComputeDtype,
    Joint,
    LongRows,
    Scoring,
    Storage,
    Switches,
    TaskType,
    Tie,
    Turns,
    check_choice,
    check_device,
    check_directory,
    check_pattern,
    check_seed,
    check_template,
    check_tracker,
)

FEWEST_EPOCHS, MOST_EPOCHS, ENOUGH_STEPS = 3, 10, 100
"""Passes over the data where none are asked for: as many as make enough steps, within bounds."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The frozen base."""

    model: str
    """Hub id or local directory of the base model."""
    storage: Storage | None = None
    """How the frozen weights are stored; default: the method's own (nf4 for loreft and qlora)."""
    compute_dtype: ComputeDtype = "auto"
    """Arithmetic of the base: auto is bf16 where the device has it, else fp32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    task_type: TaskType | None = None
    """CAUSAL_LM, or SEQ_CLS for a classification head on {"text", "label"} rows; default: the
    adapter's own, else CAUSAL_LM."""

    def __post_init__(self) -> None:
        """Check the device's name."""
        check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The rows to train on or to score."""

    data: str
    """JSONL, JSON, CSV or Parquet file, or a datasets id; or several with commas between them, of
    which @WEIGHT takes a share: a.jsonl,b.jsonl@0.5 takes half of b's rows, drawn by the seed."""
    split: str = "train"
    """Split of a datasets id; files have only one."""
    template: str | None = None
    """How a prompt is written, for example "Question: {prompt}\\nAnswer:", or chat: as the user's
    message, by the tokenizer's chat template. Default: the adapter's own, else chat if the
    tokenizer has a chat template, else "{prompt}". {messages} rows always use the chat template."""
    max_length: int | None = None
    """Tokens of prompt + response. Of longer prompts the oldest turns give way, then the text is
    cut from the left; template and system message stay, and where these do not fit beside the
    response, that is an error. Default: the adapter's own, else 512."""
    limit: int | None = None
    """Use only the first N rows (of several files, of each)."""

    def __post_init__(self) -> None:
        """Check the counts and the template."""
        check_counts(max_length=self.max_length, limit=self.limit)
        check_template(self.template)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """How rows become prompts and responses."""

    raw: bool = False
    """Write prompts as they are, also where the tokenizer has a chat template; {messages} rows need
    it all the same."""
    joint: Joint | None = None
    """What is put between a prompt and a response that have no white space there: a space, none
    (what the file holds, as it is), or auto, which puts no space beside Chinese, Japanese or Thai,
    after special tokens, opening brackets and operators, and before punctuation. Default: the
    adapter's own, else auto."""
    turns: Turns = "last"
    """What is trained and scored of {messages} rows: the last message, or all of the assistant's,
    each after everything before it, as at inference (a row each)."""
    long_rows: LongRows = "cut"
    """Rows longer than --max-length, trained on or scored. cut: prompts are cut and counted,
    responses never are, and rows whose responses leave no room for a prompt are refused. drop:
    nothing is cut, these rows are left out, and it is said how many."""


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions:
    """The rows to choose the best epoch by, and those to score after training."""

    validation_data: str | None = None
    """Rows to score after every epoch; the adapter of the best one is kept."""
    validation_split: str = "validation"
    """Split of --validation-data where that is a datasets id."""
    validation_limit: int | None = None
    """Score only the first N rows of --validation-data."""
    eval_data: str | None = None
    """Rows to score after training (never trained on, and nothing is chosen by them)."""
    eval_split: str = "test"
    """Split of --eval-data where that is a datasets id."""
    eval_limit: int | None = None
    """Score only the first N rows of --eval-data."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(validation_limit=self.validation_limit, eval_limit=self.eval_limit)


@dataclass(frozen=True, kw_only=True)
class ForgettingOptions:
    """General text, to see what a training costs beside its task."""

    forgetting: str | None = None
    """Held-out general text: a .txt file, or rows with a text column. It is cut into windows of 256
    tokens, and the loss of their second halves after their first (nats per token) is measured; how
    much an adapter raises it over the base's is what was forgotten."""
    forgetting_limit: int = 64
    """Windows of that text that are scored, from its beginning."""

    def __post_init__(self) -> None:
        """Check the count, and that there is a text that it is of."""
        check_counts(forgetting_limit=self.forgetting_limit)
        if self.forgetting is None and self.forgetting_limit != ForgettingOptions.forgetting_limit:
            raise InputError(
                f"forgetting_limit must come with forgetting, got {self.forgetting_limit!r} alone; "
                "add --forgetting"
            )

    def check_task(self, task_type: str | None) -> None:
        """Refuse the text for a classifier, under whose head no token has a likelihood.

        Raises:
            InputError: It is one.
        """
        if self.forgetting is not None and task_type == "SEQ_CLS":
            raise InputError(
                f"forgetting must be left out with task_type SEQ_CLS, got {self.forgetting!r}: a "
                "classification head gives no token a likelihood; leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class ScoringOptions:
    """How answers are found and scored."""

    scoring: Scoring = "auto"
    """likelihood of each choice, or generation and answer extraction; auto: likelihood where rows
    have choices, or where the loss is all that is asked for."""
    metric: str | None = None
    """What is scored and chosen by: accuracy, f1, matthews, pearson, spearman, loss (per supervised
    token; the lower one is better) or another that lowmem-reft tasks names. Default: accuracy; loss
    where responses have no choices and no answer is looked for in generated text."""
    extra_metrics: str | None = None
    """Comma-separated metrics that are reported beside it."""
    extractor: str | None = None
    """Finds the answer in generated text by name: number, option_letter, true_false, ..."""
    answer_pattern: str | None = None
    """Regular expression with one group that finds the answer in generated text; default: all."""
    max_new_tokens: int = 64
    """Tokens generated per example."""

    def __post_init__(self) -> None:
        """Check the count, and that there is one way to find the answer."""
        check_counts(max_new_tokens=self.max_new_tokens)
        check_pattern(self.answer_pattern)
        if self.extractor is not None and self.answer_pattern is not None:
            raise InputError(
                f"extractor must be left out with answer_pattern, got {self.extractor!r} and "
                f"{self.answer_pattern!r}; choose one"
            )


@dataclass(frozen=True, kw_only=True)
class EditOptions:
    """How a ReFT intervention edits."""

    tie: Tie | None = None
    """One set of parameters for all positions of a layer, one per side (start, end, answer), or one
    per position and one for the answer."""
    component: Component | None = None
    """Where in the block the edit is made."""
    act: str | None = None
    """Non-linearity on the learned source: relu, gelu, silu, tanh."""
    init: Literal["identity", "paper"] | None = None
    """Start of LoReFT: identity (W = R, b = 0) or the paper's random W."""


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What is trained on top of the base. Options that do not belong to the method are refused."""

    method: str = "loreft"
    """Name in the method table, for example loreft, noreft, direft, red, lora, qlora."""
    profile: Literal["fast", "balanced", "paper"] | None = None
    """Settings of ReFT that single options override: fast: upper half of the layers, l3, rank 8;
    balanced: upper half, all, rank 16; paper: all layers, f7+l7, rank 8."""
    rank: int | None = None
    """Rank of the intervention or width of a bottleneck (default 8), rank of the LoRA update
    (default 16) or width of P-tuning's network (default 128)."""
    layers: str | None = None
    """Blocks that are touched: all, "8;12;16" (0-based) or upper:0.5 (the upper half: what LoReFT
    takes where a causal model has 12 blocks or more and neither layers nor positions are given)."""
    positions: str | None = None
    """Prompt tokens that are edited: all (the default of most), f7+l7 or l3 (the default beside
    upper:0.5); l1+response: the answer's as well; response: those alone; every: all+response."""
    edit: EditOptions = field(default_factory=EditOptions)
    dropout: float | None = None
    """Dropout on the edit (ReFT) or on the update's input (LoRA)."""
    alpha: float | None = None
    """LoRA scaling numerator; the update is multiplied by alpha / rank (default 2 * rank). Strength
    of a steering vector (default 1)."""
    target_modules: str | None = None
    """Comma-separated linear layers that LoRA touches (default: all of them)."""
    lora_rank: int | None = None
    """Rank of the LoRA update beside the intervention in lora_reft (default 1)."""
    num_virtual_tokens: int | None = None
    """Trained tokens before the prompt: prefix, prompt and p_tuning (default 20)."""

    def __post_init__(self) -> None:
        """Check the numbers; what depends on the method is checked where it is built."""
        check_counts(
            rank=self.rank,
            lora_rank=self.lora_rank,
            num_virtual_tokens=self.num_virtual_tokens,
        )
        if self.profile is not None:
            check_choice("profile", self.profile, ("fast", "balanced", "paper"))
        check_positive(alpha=self.alpha)
        check_at_most(MOST_OF_A_STEP, rank=self.rank)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout!r}; for example 0.05")


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """The optimizer and its schedule."""

    epochs: Annotated[float | None, tyro.conf.arg(aliases=("--num-train-epochs",))] = None
    """Passes over the data (default 3; of few rows as many as make 100 steps, at most 10)."""
    max_steps: int = -1
    """Stop after this many optimizer steps; -1: after --epochs."""
    lr: Annotated[float | None, tyro.conf.arg(aliases=("--learning-rate",))] = None
    """Peak learning rate; the method's default if not given."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=("--per-device-train-batch-size",))] = 8
    """Examples per forward pass, in each process."""
    gradient_accumulation: Annotated[
        int, tyro.conf.arg(aliases=("--gradient-accumulation-steps",))
    ] = 1
    """Forward passes per optimizer step."""
    schedule: Annotated[str, tyro.conf.arg(aliases=("--lr-scheduler-type",))] = "linear"
    """Learning-rate schedule, by its transformers name (linear, cosine, constant, ...)."""
    warmup_ratio: float = 0.1
    """Share of the steps during which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    optim: str = "adamw_torch"
    """Optimizer, by its transformers name (adamw_torch, paged_adamw_8bit, ...)."""
    group_by_length: bool = False
    """Put examples of like lengths into a batch, which is drawn from 50 batches' worth: less is
    computed for padding, but where length tells classes apart a short training may lose by it."""
    packing: Literal["auto", "on", "off"] = "auto"
    """Put the examples of a batch one after the other instead of padding them, each as if alone:
    the same batches and steps, to rounding, and less to compute. auto: where the base, the method
    and --reuse allow it; on: refuse where they do not; off: pad."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_counts(batch_size=self.batch_size, gradient_accumulation=self.gradient_accumulation)
        check_at_most(MOST_OF_A_STEP, batch_size=self.batch_size, weight_decay=self.weight_decay)
        check_positive(epochs=self.epochs, lr=self.lr, max_grad_norm=self.max_grad_norm)
        check_not_negative(weight_decay=self.weight_decay)
        if self.max_steps != -1 and self.max_steps < 1:
            raise InputError(
                f"max_steps must be -1 or at least 1, got {self.max_steps!r}; -1 goes by epochs"
            )
        if not 0 <= self.warmup_ratio <= 1:
            raise InputError(
                f"warmup_ratio must be from 0 to 1, got {self.warmup_ratio!r}; it is a share of "
                "the steps"
            )
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("optim", self.optim, OPTIMIZERS)

    def num_steps(self, num_examples: int, *, num_processes: int = 1) -> int:
        """Return the optimizer steps of a run, as the Trainer counts them."""
        if self.max_steps > 0:
            return self.max_steps
        epochs = self.num_epochs(num_examples, num_processes=num_processes)
        return math.ceil(epochs * self.steps_per_epoch(num_examples, num_processes=num_processes))

    def num_epochs(self, num_examples: int, *, num_processes: int = 1) -> float:
        """Return the passes over the data: those given, or enough for an adapter to learn by.

        Default learning rates are for about as many steps as ``ENOUGH_STEPS``: benchmarks/LOG.md.
        """
        if self.epochs is not None:
            return self.epochs
        of_one = self.steps_per_epoch(num_examples, num_processes=num_processes)
        return float(min(max(math.ceil(ENOUGH_STEPS / of_one), FEWEST_EPOCHS), MOST_EPOCHS))

    def steps_per_epoch(self, num_examples: int, *, num_processes: int = 1) -> int:
        """Return the optimizer steps of one pass over the data, as the Trainer counts them."""
        passes = math.ceil(num_examples / (self.batch_size * num_processes))
        return max(1, math.ceil(passes / self.gradient_accumulation))


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """How the run saves memory."""

    activation_checkpointing: Annotated[
        bool, tyro.conf.arg(aliases=("--checkpointing", "--gradient-checkpointing"))
    ] = False
    """Recompute blocks above the first intervention in the backward pass."""
    checkpoint_every: int = 1
    """With --activation-checkpointing: recompute blocks 0, n, 2n, ... only."""
    offload_activations: bool = False
    """With --activation-checkpointing: keep the blocks' inputs in host memory (CUDA only)."""
    mlp_tokens: int | None = None
    """Run MLPs on this many tokens at a time and recompute each part in the backward pass."""
    embedding_on_host: bool = False
    """Keep the input embedding in host memory, where the output head does not share it."""
    memory_gib: float | None = None
    """Fit into this much memory: the fastest split of the batch and the ways to save memory that
    are needed are chosen before anything is loaded; what cannot fit is refused. Default of train:
    what is free on the device."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(checkpoint_every=self.checkpoint_every, mlp_tokens=self.mlp_tokens)
        check_positive(memory_gib=self.memory_gib)
        check_at_most(MOST_OF_A_STEP, memory_gib=self.memory_gib)


@dataclass(frozen=True, kw_only=True)
class ReuseOptions:
    """What is constant is computed once and stored."""

    reuse: Literal["auto", "off", "prefix", "trunk"] = "auto"
    """trunk: store what leaves the blocks below the first trained one; prefix: also keys and values
    of the tokens before the first edit; auto: what saves time; off: neither."""
    reuse_dir: Path | None = None
    """Directory of stores, which runs share; default: reuse in --output-dir."""
    reuse_limit_gib: float | None = 20.0
    """Most that one store may take on the disk."""
    resident: Literal["all", "upper"] = "all"
    """upper: only the blocks above the constant ones are ever on the device; the others are read
    one after the other while the store is built, so that a base larger than the card trains."""
    dequantize_upper: Literal["auto", "on", "off"] = "auto"
    """on: keep the 4-bit blocks above the constant ones dequantized while training from a store:
    the same numbers, faster steps, four (16-bit) or eight times their memory; auto: where few
    tokens run in a step and it takes no more memory than a plain step, or with --memory-gib where
    there is room for it."""

    def __post_init__(self) -> None:
        """Check the limit, and that a part of the base has something to train from."""
        check_positive(reuse_limit_gib=self.reuse_limit_gib)
        check_directory("reuse_dir", self.reuse_dir)
        if self.resident == "upper" and self.reuse == "off":
            raise InputError(
                "reuse must be auto, prefix or trunk with --resident upper, got 'off'; the upper "
                "blocks train from what is stored of the lower ones"
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Switches):
    """Where the run writes and what it says."""

    output_dir: Path
    """Directory for the adapter, checkpoints and result.json."""
    seed: int = 0
    """Seed of the adapter's initialisation, the data order and dropout."""
    resume: bool = False
    """Go on from the last checkpoint in --output-dir."""
    no_fit: bool = False
    """Run as the options say, though the memory that is free may be too little: else, without
    --memory-gib, a run that does not fit is fitted into what is free, or refused."""
    overwrite: bool = False
    """Replace the run in --output-dir, whatever its settings are."""
    dry_run: bool = False
    """Say what would be trained and whether it fits into memory; nothing is loaded or written."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints; default: one every epoch."""
    logging_steps: int = 10
    """Optimizer steps between loss reports."""
    report_to: str = "none"
    """Trackers, comma-separated, by their transformers names (tensorboard, wandb, ...); all: those
    that are installed."""

    def __post_init__(self) -> None:
        """Check the counts, the seed and the trackers."""
        check_counts(save_steps=self.save_steps, logging_steps=self.logging_steps)
        check_directory("output_dir", self.output_dir)
        if self.resume and self.overwrite:
            raise InputError(
                "overwrite must be left out with resume, got both; one goes on with the run, the "
                "other begins anew"
            )
        check_seed(self.seed)
        if self.report_to != "all":
            for name in self.report_to.split(","):
                check_tracker(name)
