"""Every option of every subcommand, once: command line, help and Python API are built from these.

A value that breaks its rule is an ``InputError`` as soon as it is given, before anything is loaded.
No torch is imported here, so that ``lowmem-reft --help`` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lowmem_reft.errors import InputError, check_counts, check_not_negative, check_positive

Storage = Literal["nf4", "fp4", "int8", "bf16", "fp16", "fp32"]
ComputeDtype = Literal["auto", "bf16", "fp16", "fp32"]
TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]
Tie = Literal["tied", "sides", "positions"]
Component = Literal["block_output", "mlp_output", "attention_output"]
Scoring = Literal["auto", "likelihood", "generation"]
Workers = int | Literal["ray"]
PyreftClass = Literal[
    "LoreftIntervention",
    "NoreftIntervention",
    "DireftIntervention",
    "NodireftIntervention",
    "ConsreftIntervention",
    "LobireftIntervention",
]

SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
"""Those of transformers that need no arguments of their own and no evaluation during training."""

OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "adafactor",
    "adagrad",
    "sgd",
)
"""Those of transformers that need no package beside torch and bitsandbytes."""

TRACKERS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Those of transformers, with the modules of which each needs one."""


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


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The rows to train on or to score."""

    data: str
    """JSONL, CSV or Parquet file, or a datasets id."""
    split: str = "train"
    """Split of a datasets id; files have only one."""
    template: str | None = None
    """How a prompt is written, for example "Question: {prompt}\\nAnswer:"; default: the adapter's
    own, else "{prompt}". {messages} rows use the tokenizer's chat template."""
    max_length: int | None = None
    """Tokens of prompt + response; longer prompts are cut from the left, a response that does not
    fit is an error. Default: the adapter's own, else 512."""
    limit: int | None = None
    """Use only the first N rows."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(max_length=self.max_length, limit=self.limit)


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
class ScoringOptions:
    """How answers are found and scored."""

    scoring: Scoring = "auto"
    """likelihood of each choice, or generation and answer extraction; auto: likelihood where rows
    have choices."""
    metric: str = "accuracy"
    """accuracy, f1, matthews, pearson, spearman or another that lowmem-reft tasks names."""
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
        if self.extractor is not None and self.answer_pattern is not None:
            raise InputError(
                f"extractor must be left out with answer_pattern, got {self.extractor!r} and "
                f"{self.answer_pattern!r}; choose one"
            )


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What is trained on top of the base. Options that do not belong to the method are refused."""

    method: str = "loreft"
    """Name in the method table, for example loreft, noreft, direft, red, lora, qlora."""
    profile: Literal["fast", "balanced", "paper"] | None = None
    """Where ReFT edits, unless --layers, --positions or --rank say otherwise. fast: upper half, l3,
    rank 16; balanced: upper half, all, rank 16; paper: all layers, f7+l7, rank 8."""
    rank: int | None = None
    """Rank of the intervention (default 4) or of the LoRA update (default 16); a bottleneck's width
    (default 8) or of P-tuning's network (default 128)."""
    layers: str | None = None
    """Blocks that are touched: all, "8;12;16" (0-based) or upper:0.5 (the upper half)."""
    positions: str | None = None
    """Prompt tokens that are edited: f7+l7, f3, l1 or all."""
    tie: Tie | None = None
    """One set of parameters for all positions of a layer, one per side, or one per position."""
    component: Component | None = None
    """Where in the block the edit is made."""
    act: str | None = None
    """Non-linearity on the learned source: relu, gelu, silu, tanh."""
    dropout: float | None = None
    """Dropout on the edit (ReFT) or on the update's input (LoRA)."""
    init: Literal["identity", "paper"] | None = None
    """Start of LoReFT: identity (W = R, b = 0) or the paper's random W."""
    alpha: float | None = None
    """LoRA scaling numerator; the update is multiplied by alpha / rank (default 2 * rank). Strength
    of a steering vector (default 1)."""
    target_modules: str | None = None
    """Comma-separated linear layers that LoRA touches (default: all of them)."""
    lora_rank: int | None = None
    """Rank of the LoRA update beside the intervention in lora_reft (default 16)."""
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
            _check_choice("profile", self.profile, ("fast", "balanced", "paper"))
        check_positive(alpha=self.alpha)
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"dropout must be in [0, 1), got {self.dropout!r}; for example 0.05")


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """The optimizer and its schedule."""

    epochs: float = 3.0
    """Passes over the data."""
    max_steps: int = -1
    """Stop after this many optimizer steps; -1: after --epochs."""
    lr: float | None = None
    """Peak learning rate; the method's default if not given."""
    batch_size: int = 8
    """Examples per forward pass, in each process."""
    gradient_accumulation: int = 1
    """Forward passes per optimizer step."""
    schedule: str = "linear"
    """Learning-rate schedule, by its transformers name (linear, cosine, constant, ...)."""
    warmup_ratio: float = 0.1
    """Share of the steps during which the learning rate rises."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    optim: str = "adamw_torch"
    """Optimizer, by its transformers name (adamw_torch, paged_adamw_8bit, ...)."""

    def __post_init__(self) -> None:
        """Check every field."""
        check_counts(batch_size=self.batch_size, gradient_accumulation=self.gradient_accumulation)
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
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("optim", self.optim, OPTIMIZERS)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """How the run saves memory."""

    activation_checkpointing: Annotated[bool, tyro.conf.arg(aliases=("--checkpointing",))] = False
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
    are needed are chosen before anything is loaded; what cannot fit is refused."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(checkpoint_every=self.checkpoint_every, mlp_tokens=self.mlp_tokens)
        check_positive(memory_gib=self.memory_gib)


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
    dequantize_upper: bool = False
    """Keep the 4-bit blocks above the constant ones dequantized while training from a store: the
    same numbers, faster steps, four (16-bit) or eight times their memory."""

    def __post_init__(self) -> None:
        """Check the limit, and that a part of the base has something to train from."""
        check_positive(reuse_limit_gib=self.reuse_limit_gib)
        _check_directory("reuse_dir", self.reuse_dir)
        if self.resident == "upper" and self.reuse == "off":
            raise InputError(
                "reuse must be auto, prefix or trunk with --resident upper, got 'off'; the upper "
                "blocks train from what is stored of the lower ones"
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run writes and what it says."""

    output_dir: Path
    """Directory for the adapter, checkpoints and result.json."""
    seed: int = 0
    """Seed of the adapter's initialisation, the data order and dropout."""
    resume: bool = False
    """Go on from the last checkpoint in --output-dir."""
    save_steps: int | None = None
    """Optimizer steps between checkpoints; default: one every epoch."""
    logging_steps: int = 10
    """Optimizer steps between loss reports."""
    report_to: str = "none"
    """Trackers, comma-separated, by their transformers names (tensorboard, wandb, ...); all: those
    that are installed."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        """Check the counts, the seed and the trackers."""
        check_counts(save_steps=self.save_steps, logging_steps=self.logging_steps)
        _check_directory("output_dir", self.output_dir)
        _check_seed(self.seed)
        if self.report_to != "all":
            for name in self.report_to.split(","):
                _check_tracker(name)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fine-tune one adapter on a frozen base."""

    model: ModelOptions
    data: DataOptions
    held_out: HeldOutOptions = field(default_factory=HeldOutOptions)
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
    run: RunOptions


@dataclass(frozen=True, kw_only=True)
class ScoredDataOptions(DataOptions):
    """The rows to score."""

    data: str = ""
    """JSONL, CSV or Parquet file, or a datasets id. Not with --lm-eval, whose tasks have rows."""


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
            given = [name for name in ("include_path", "num_fewshot") if getattr(self, name)]
            given += ["apply_chat_template"] if self.apply_chat_template else []
            if given:
                raise InputError(
                    f"{given[0]} must come with lm_eval, got {str(getattr(self, given[0]))!r} "
                    "alone; add --lm-eval TASKS"
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
class EvaluateOptions:
    """Score a base with or without an adapter: accuracy by choice likelihood or by generation."""

    model: ModelOptions
    data: DataOptions = field(default_factory=ScoredDataOptions)
    harness: HarnessOptions = field(default_factory=HarnessOptions)
    adapter: Path | None = None
    """Adapter directory; without it the base itself is scored."""
    only_given_storage: bool = False
    """Where --storage is not that of the training: score on it alone, not on both in turn."""
    scoring: ScoringOptions = field(default_factory=ScoringOptions)
    batch_size: int = 16
    """Sequences per forward pass."""
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
    predictions: Path | None = None
    """Write one JSON line per example here."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        """Check the count, and that it is said what to score."""
        check_counts(batch_size=self.batch_size)
        tasks = self.harness.lm_eval
        if bool(self.data.data) == bool(tasks):
            raise InputError(
                f"data must be given, or lm_eval, and not both, got {self.data.data!r} and "
                f"{tasks!r}; for example --data test.jsonl"
            )
        if tasks and self.reuse.resident != "all":
            raise InputError(
                f"resident must be all with lm_eval, got {self.reuse.resident!r}; leave it out"
            )


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
    """Texts at which an answer ends, and which are left out of it; "\\n" is a new line."""
    seed: int = 0
    """Seed of the sampling; what is drawn also depends on the batch size."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_counts(max_new_tokens=self.max_new_tokens)
        check_not_negative(temperature=self.temperature)
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p!r}; 1 is off")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError(
                f"top_p must be 1 where nothing is drawn, got {self.top_p!r}; raise temperature"
            )
        if "" in self.stop:
            raise InputError(f"stop must be texts that are not empty, got {self.stop!r}; change it")
        _check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Continue prompts from a file, or one prompt, with a base and one or several adapters."""

    model: ModelOptions
    adapter: str | None = None
    """Adapter directory, or several with commas between them: each answers every prompt, and so
    does the base where __base__ is among them. Without it the base alone answers."""
    input: Path | None = None
    """JSONL file with {"prompt"} or {"messages"} rows."""
    prompt: str | None = None
    """One prompt instead of a file."""
    output: Path | None = None
    """JSONL file to write; default: standard output. One that is there is completed: the same
    command goes on where it was interrupted."""
    overwrite: bool = False
    """Write --output anew, whatever is there."""
    template: str | None = None
    """How a prompt is written; default: as in each adapter's training, else "{prompt}"."""
    max_length: int | None = None
    """Tokens of the prompt; longer ones are cut from the left and counted. Default: the adapter's
    own, else 512."""
    decoding: DecodingOptions = field(default_factory=DecodingOptions)
    batch_size: int = 8
    """Prompts per forward pass (left-padded), of several adapters together."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar."""

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
    template: str | None = None
    """Write each message by this template, on its own, instead of the tokenizer's chat template;
    default, where the tokenizer has none: as in the adapter's training, else "{prompt}"."""
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
class LengthOptions:
    """How much goes through the model at once."""

    seq_len: int = 2048
    """Tokens of prompt + response of the longest example."""
    response_len: int | None = None
    """Supervised tokens of it; default: half."""
    batch_size: int = 1
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


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """The base as it would be loaded."""

    model: str = "llama-3.1-8b"
    """Hub id, directory, config.json, or a known model by its short name (llama-3.2-1b,
    llama-3.2-3b, llama-3.1-8b, llama-3.3-70b, qwen3-4b, qwen3-8b, qwen3-14b, qwen3-32b); with
    --table several, separated by commas."""
    storage: Storage | None = None
    """How the frozen weights are stored; default: the method's own (nf4 for loreft and qlora)."""
    compute_dtype: ComputeDtype = "auto"
    """Arithmetic of the base: auto is bf16 (fp32 with --device cpu)."""
    task_type: TaskType = "CAUSAL_LM"
    """CAUSAL_LM, or SEQ_CLS for a classification head."""
    attn_implementation: str | None = None
    """eager, sdpa, ...; default: what transformers picks."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whose kernels are planned for; cuda needs no card here."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Predict the peak memory of training before a byte is loaded; no weights, no GPU needed."""

    shape: ShapeOptions = field(default_factory=ShapeOptions)
    method: MethodOptions = field(default_factory=MethodOptions)
    lengths: LengthOptions = field(default_factory=LengthOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    reuse: Literal["auto", "off", "prefix", "trunk"] = "off"
    """Predict the step that trains from a store (see train --reuse); off: the plain step."""
    resident: Literal["all", "upper"] = "all"
    """upper: without the blocks below the constant ones (see train --resident)."""
    gpu: str | None = None
    """A card to fit into, by name (a10, 4090, 3060, t4, ...); or give --memory-gib."""
    optim: str = "adamw_torch"
    """Optimizer: adamw_torch, adamw_torch_fused or sgd."""
    loss: Literal["chunked", "model"] = "chunked"
    """chunked: ours, on supervised tokens; model: the model's own, with logits for all tokens."""
    fit: bool = False
    """Search the fastest setting that fits and the longest context, and print the train command."""
    table: bool = False
    """Print the longest context of models and methods on cards of 8 to 80 GB."""
    methods: str = "loreft,qlora"
    """Methods of the table."""
    num_examples: int = 1000
    """Examples of the data set, all of --seq-len tokens, for what training could reuse."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """Say nothing about what is being tried."""

    def __post_init__(self) -> None:
        """Check the count."""
        check_counts(num_examples=self.num_examples)


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """Run one training step for real, measure its memory, and compare it with the prediction."""

    model: ModelOptions
    method: MethodOptions = field(default_factory=MethodOptions)
    lengths: LengthOptions = field(default_factory=lambda: LengthOptions(seq_len=256))
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    loss: Literal["chunked", "model"] = "chunked"
    """chunked: ours, on supervised tokens; model: the model's own, with logits for all tokens."""
    output_dir: Path = Path("profile")
    """Where the timelines (PNG and HTML), profile.json and, on CUDA, the snapshot for torch's
    memory viewer go."""
    random_weights: bool = False
    """Fill the configuration's shapes with random weights instead of loading the checkpoint."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar."""


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
        _check_seed(self.seed)
        _check_directory("output_dir", self.output_dir)
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


@dataclass(frozen=True, kw_only=True)
class ImportPyreftOptions:
    """Turn a checkpoint of pyreft into an adapter. What it does not hold has to be said here."""

    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """What pyreft saved: a directory with intkey_*.bin, or a checkpoint-N of its Trainer."""
    positions: str
    """Prompt tokens that it was trained to edit: f7+l7, f3, l1 or all."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Where the adapter goes: a new or an empty directory."""
    tie: Literal["tied", "sides"] | None = None
    """tied: share_weights in pyreft; sides: one intervention for fN, one for lM. Default: by how
    many the directory has per layer."""
    act: Literal["none", "relu", "gelu", "silu", "tanh"] | None = None
    """act_fn that it was trained with, or none; needed where the class has one."""
    intervention: PyreftClass | None = None
    """pyreft's class, where neither config.json nor the tensors tell."""
    model: str | None = None
    """Hub id or directory of the base; default: any whose blocks are at model.layers."""
    task_type: TaskType = "CAUSAL_LM"
    """CAUSAL_LM, or SEQ_CLS where a classification head was trained with it."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """Leave out the notes on what the files do not hold."""

    def __post_init__(self) -> None:
        """Check that a directory can be there."""
        _check_directory("output_dir", self.output_dir)


@dataclass(frozen=True, kw_only=True)
class ExportPyreftOptions:
    """Write an adapter as pyreft 0.1.0 saves it, and a README with what pyreft does not store."""

    adapter_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER_DIR")]
    """Adapter directory, or that of the run that trained it."""
    output_dir: Annotated[Path, tyro.conf.arg(aliases=("-o",))]
    """Where the files go: a new or an empty directory."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """Leave out the notes on what the files do not hold."""

    def __post_init__(self) -> None:
        """Check that a directory can be there."""
        _check_directory("output_dir", self.output_dir)


@dataclass(frozen=True, kw_only=True)
class CacheListOptions:
    """List the stores in a directory: what they hold, their size, when they were last used."""

    reuse_dir: Path
    """Directory of stores: --reuse-dir of train, or reuse in a run's --output-dir."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """No progress bar (there is none; for scripts that always ask for that)."""


@dataclass(frozen=True, kw_only=True)
class CacheRemoveOptions:
    """Remove stores; training builds again what it needs. One that is being built is kept."""

    keys: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[KEY ...]")] = ()
    """Names or keys, as ls shows them, or their beginnings."""
    reuse_dir: Path
    """Directory of stores: --reuse-dir of train, or reuse in a run's --output-dir."""
    all: bool = False
    """Remove all stores in the directory."""
    older_than_days: float | None = None
    """Remove only stores, of those named or else of all, last used more than N days ago."""
    json: bool = False
    """Print one JSON object as the last line of standard output."""
    quiet: bool = False
    """Do not say what was removed."""

    def __post_init__(self) -> None:
        """Check that it is said what to remove, and only once."""
        check_positive(older_than_days=self.older_than_days)
        if self.all and self.keys:
            raise InputError(
                f"keys must be left out with all, got {' '.join(self.keys)!r}; leave out one of "
                "the two"
            )
        if not (self.all or self.keys or self.older_than_days):
            raise InputError(
                "keys must name what to remove, got none; give keys, --older-than-days or --all"
            )


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """List or remove what train --reuse has stored."""

    action: (
        Annotated[CacheListOptions, tyro.conf.subcommand("ls", prefix_name=False)]
        | Annotated[CacheRemoveOptions, tyro.conf.subcommand("rm", prefix_name=False)]
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r}; choose one")


def _check_tracker(name: str) -> None:
    if name == "none":
        return
    if name not in TRACKERS:
        raise InputError(
            f"report_to must be none, all or names among {', '.join(TRACKERS)}, got {name!r}; "
            "change it"
        )
    modules = TRACKERS[name]
    if modules and not any(map(find_spec, modules)):
        raise InputError(
            f"report_to must name trackers that are installed, got {name!r}; install "
            f"{' or '.join(modules)}, or leave it out"
        )


def _check_directory(name: str, path: Path | None) -> None:
    if path is not None and path.exists() and not path.is_dir():
        raise InputError(f"{name} must be a directory, got the file {str(path)!r}; choose another")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be from 0 to {2**32 - 1}, got {seed!r}; for example 0")
