"""Options of the subcommands that say what fits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lowmem_reft.errors import MOST_OF_A_STEP, InputError, check_at_most, check_counts
from lowmem_reft.options.groups import (
    DataOptions,
    MemoryOptions,
    MethodOptions,
    ModelOptions,
    PromptOptions,
)
from lowmem_reft.options.values import ComputeDtype, Storage, Switches, TaskType, check_directory
from lowmem_reft.options.written import given

_MOST_TOKENS = 2**22
"""Of a row: four million. Masks of so many are counted here, and take memory and time."""


@dataclass(frozen=True, kw_only=True)
class LengthOptions:
    """How much goes through the model at once."""

    seq_len: int = 512
    """Tokens of prompt + response of the longest example."""
    response_len: int | None = None
    """Supervised tokens of it; default: half."""
    batch_size: int = 8
    """Examples per forward pass."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    unpadded: bool = False
    """All examples of a batch have the same length: no attention mask is needed."""
    max_new_tokens: int = 256
    """Tokens generated after a prompt of --seq-len tokens, for the peak of generation."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(
            seq_len=self.seq_len,
            response_len=self.response_len,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            max_new_tokens=self.max_new_tokens,
        )
        check_at_most(MOST_OF_A_STEP, batch_size=self.batch_size)
        check_at_most(_MOST_TOKENS, seq_len=self.seq_len, max_new_tokens=self.max_new_tokens)
        if self.response_len is not None and self.response_len > self.seq_len:
            raise InputError(
                f"response_len must be at most seq_len, which is {self.seq_len}, got "
                f"{self.response_len}; it is a part of it"
            )


@dataclass(frozen=True, kw_only=True)
class PlannedRowsOptions(DataOptions):
    """The rows to plan for, instead of lengths."""

    data: str = ""
    """JSONL, JSON, CSV or Parquet file, or a datasets id: --seq-len, --response-len and
    --num-examples are then those of its rows, as train reads them, and --model must have a
    tokenizer."""
    prompts: PromptOptions = field(default_factory=PromptOptions)

    def __post_init__(self) -> None:
        """Check the counts, and that there are rows for what is said of them."""
        super().__post_init__()
        if not self.data:
            for name, value in given(self).items():
                raise InputError(
                    f"{name} must come with data, got {value} alone; add --data FILE, or give "
                    "--seq-len"
                )


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """The base as it would be loaded."""

    model: str = "llama-3.1-8b"
    """Hub id, directory, config.json, or a known model by its short name (llama-3.2-1b, -3b,
    llama-3.1-8b, llama-3.3-70b, qwen2.5-0.5b, -1.5b, -3b, -7b, -14b, -32b, -72b, qwen3-0.6b, -1.7b,
    -4b, -8b, -14b, -32b, mistral-7b-v0.3, gemma-2-2b, -9b, -27b, smollm2-135m, -360m, -1.7b), which
    train knows by its hub id; that id and those of its base and instruct versions need no hub
    either. With --table several, separated by commas."""
    storage: Storage | None = None
    """How the frozen weights are stored; default: the method's own (nf4 for loreft and qlora)."""
    compute_dtype: ComputeDtype = "auto"
    """Arithmetic of the base: auto is bf16 where the card has it, else fp32; with --device cpu what
    train takes on this machine."""
    task_type: TaskType = "CAUSAL_LM"
    """CAUSAL_LM, or SEQ_CLS for a classification head."""
    attn_implementation: str | None = None
    """eager, sdpa, ...; default: what transformers picks."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whose kernels are planned for; cuda needs no card here."""


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """The step that trains from a store."""

    reuse: Literal["auto", "off", "prefix", "trunk"] = "off"
    """Predict the step that trains from a store (see train --reuse); off: the plain step."""
    resident: Literal["all", "upper"] = "all"
    """upper: without the blocks below the constant ones (see train --resident)."""
    num_examples: int = 1000
    """Examples of the data set, all of --seq-len tokens, for what training could reuse."""

    def __post_init__(self) -> None:
        """Check the count, and that a part of the base has something to train from."""
        check_counts(num_examples=self.num_examples)
        if self.resident == "upper" and self.reuse == "off":
            raise InputError(
                "reuse must be auto, prefix or trunk with resident upper, got 'off'; the upper "
                "blocks train from what is stored of the lower ones"
            )


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """The longest contexts of several methods."""

    table: bool = False
    """Print the longest context of models and methods on cards of 8 to 80 GB."""
    methods: str = "loreft,qlora"
    """Methods of the table."""

    def __post_init__(self) -> None:
        """Check that there is a table for the methods."""
        if self.methods != "loreft,qlora" and not self.table:
            raise InputError(
                f"methods must come with table, got {self.methods!r} alone; add --table, or name "
                "one method by --method"
            )


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What else a training step's memory depends on."""

    optim: str = "adamw_torch"
    """Optimizer: adamw_torch, adamw_torch_fused or sgd."""
    loss: Literal["chunked", "model"] = "chunked"
    """chunked: ours, on supervised tokens; model: the model's own, with logits for all tokens."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Switches):
    """Predict the peak memory of training before a byte is loaded; no weights, no GPU needed."""

    shape: ShapeOptions = field(default_factory=ShapeOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    lengths: LengthOptions = field(default_factory=LengthOptions)
    rows: PlannedRowsOptions = field(default_factory=PlannedRowsOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    store: StoreOptions = field(default_factory=StoreOptions)
    step: StepOptions = field(default_factory=StepOptions)
    gpu: str | None = None
    """A card to fit into, by name (a10, 4090, 3060, t4, ...); or give --memory-gib."""
    fit: bool = False
    """Search the fastest setting that fits and the longest context, and print the train command;
    where not even the upper blocks alone fit, the exit code is 3."""
    longest: TableOptions = field(default_factory=TableOptions)

    def __post_init__(self) -> None:
        """Check that lengths are said once, and that a step that is fitted is one of train's."""
        lengths = given(self.lengths) | given(self.store)
        for name in ("seq_len", "response_len", "num_examples"):
            if self.rows.data and name in lengths:
                raise InputError(
                    f"{name} must be left out with data, got {lengths[name]}: the rows say it; "
                    "leave out one of the two"
                )
        if self.fit and self.step.loss == "model":
            raise InputError(
                "loss must be chunked with fit, got 'model': train has no other; leave it out"
            )
        if self.fit and self.shape.attn_implementation is not None:
            raise InputError(
                f"attn_implementation must be left out with fit, got "
                f"{self.shape.attn_implementation!r}: train takes what transformers picks"
            )
        if self.rows.data and self.longest.table:
            raise InputError(
                f"data must be left out with table, got {self.rows.data!r}: a table looks for the "
                "longest examples itself"
            )


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(Switches):
    """Run one training step for real, measure its memory, and compare it with the prediction."""

    model: ModelOptions
    method: MethodOptions = field(default_factory=MethodOptions)
    lengths: LengthOptions = field(default_factory=lambda: LengthOptions(seq_len=256, batch_size=1))
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    loss: Literal["chunked", "model"] = "chunked"
    """chunked: ours, on supervised tokens; model: the model's own, with logits for all tokens."""
    output_dir: Path = Path("profile")
    """Where the timelines (PNG and HTML), profile.json and, on CUDA, the snapshot for torch's
    memory viewer go."""
    random_weights: bool = False
    """Fill the configuration's shapes with random weights instead of loading the checkpoint."""

    def __post_init__(self) -> None:
        """Check that a directory can be there."""
        check_directory("output_dir", self.output_dir)
