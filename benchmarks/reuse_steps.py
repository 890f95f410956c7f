"""What both parts of ``benchmarks.reuse`` share: options, methods, timed steps, arithmetic.

The arithmetic counts products with the frozen base's matrices, in units of one token through one
block; the head weighs as much as it has weights. A forward pass takes one product per matrix and
token, so does the gradient by its input, and frozen matrices have no gradient of their own:

- QLoRA: forward and backward through all blocks; checkpointing repeats the forward pass. PEFT's
  loss forms all logits and goes back through them; ours takes supervised tokens alone.
- LoReFT at block k: forward through all blocks, backward through those above k.
- LoReFT, reused: forward and backward above k, on the tokens that an edit can reach (``l1``: the
  last prompt token and the response).

Attention scores, adapters, the optimizer, dequantization and memory traffic are not counted. The
adapters alone are 4 % of a QLoRA step here, so a share of the limit may come out above 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import torch
import tyro
from peft import LoraConfig, get_peft_model

from benchmarks.common import now
from lowmem_reft import ReftConfig
from lowmem_reft.base.blocks import device_of
from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.reuse.reuse import Reuse

Key = TypeVar("Key")
EIGHT: Final = "llama-3.1-8b"
SEVENTY: Final = "llama-3.3-70b"


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Methods take turns on a base of 246 M parameters."""

    curve_repeats: int = 2
    """``repeats`` for points of curves."""
    threads: int = 2
    """Threads."""
    curves: bool = False
    """Measure the curves too (about 5 minutes on two cores) and, with --output, plot them."""


@dataclass(frozen=True, kw_only=True)
class AtSize:
    """Methods follow each other at the shape of a real model."""

    shape: Literal["llama-3.1-8b", "llama-3.3-70b"] | None = None
    """Which; default on a card: 8B, on the CPU none."""
    prompt: int = 1536
    """Prompt tokens per example."""
    response: int = 512
    """Supervised tokens per example."""
    batch_size: int | None = None
    """Examples per step; default: 4 for 8B, 2 for 70B."""
    limit_gib: float = 24
    """Device memory of the 70B rows that have a limit."""
    methods: str | None = None
    """Only rows whose method contains this."""
    seconds: float = 480
    """Rows that would start later than this are left out, and named."""


@dataclass(frozen=True, kw_only=True)
class ReuseBenchmark:
    """Time the reused step."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    repeats: int | None = None
    """Timed rounds after one that is not counted, and builds of each store (3); at the shape of a
    real model timed steps after three that are not counted (5)."""
    batches: int = 2
    """Batches of examples in the data set."""
    rounds: tyro.conf.OmitArgPrefixes[Rounds] = Rounds()
    """Without the shape of a real model."""
    at_size: tyro.conf.OmitArgPrefixes[AtSize] = AtSize()
    """At the shape of a real model."""
    small: bool = False
    """A tiny base and short examples, which only show that the benchmark works."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/reuse.json, or reuse-SHAPE.json); the plot goes
    beside it."""

    @property
    def turn_s(self) -> float:
        """How long a method goes on in its turn, in seconds."""
        return 0.02 if self.small else 1.0

    def sized(self, shape: Shape) -> Shape:
        """Return the shape, or a smaller one of the same proportions."""
        return shape.smaller(16) if self.small else shape


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One comparison."""

    name: str
    """For people."""
    prompt: int
    """Prompt tokens per example."""
    response: int
    """Supervised tokens per example."""
    batch_size: int
    """Examples per step."""
    layers: str
    """Blocks that LoReFT edits."""
    positions: Literal["l1", "all"]
    """Tokens that it edits."""
    lowest: int
    """The lowest edited block."""

    @property
    def tokens(self) -> int:
        """All tokens of one step."""
        return self.batch_size * (self.prompt + self.response)

    @property
    def kept(self) -> int:
        """Tokens of one step that an edit can reach."""
        return self.batch_size * (self.response + 1) if self.positions == "l1" else self.tokens

    def smaller(self, divisor: int) -> Shape:
        """Return the shape with fewer tokens."""
        return replace(self, prompt=self.prompt // divisor, response=self.response // divisor)


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a step trains."""

    label: str
    """For people."""
    trains: Literal["qlora", "loreft"]
    """QLoRA r16 on all linear layers, or LoReFT r4 where the shape says."""
    our_loss: bool = True
    """Supervised logits only, a few at a time; else the model's own loss on all logits."""
    checkpointing: bool = False
    """Whether blocks are recomputed in the backward pass."""
    reused: bool = False
    """Whether it starts from stored constants."""
    dequantized: bool = False
    """Whether the blocks that it runs are kept dequantized (``--dequantize-upper``)."""


QLORA = Method(label="PEFT QLoRA r16", trains="qlora", our_loss=False)
QLORA_OURS = Method(label="QLoRA r16, our loss", trains="qlora")
QLORA_CHECKPOINTED = replace(QLORA, label="PEFT QLoRA r16, checkpointing", checkpointing=True)
PLAIN = Method(label="LoReFT, plain", trains="loreft")
PLAIN_CHECKPOINTED = replace(PLAIN, label="LoReFT, plain, checkpointing", checkpointing=True)
REUSED = replace(PLAIN, label="LoReFT, reused", reused=True)
REUSED_DEQUANTIZED = replace(REUSED, label="LoReFT, reused, upper dequantized", dequantized=True)


def make_examples(config: Any, shape: Shape, count: int) -> list[dict[str, Any]]:
    """Return so many random examples of the shape's length in tokens."""
    generator = torch.Generator().manual_seed(0)
    prompt, total = shape.prompt, shape.prompt + shape.response
    examples = []
    for _ in range(count):
        ids = torch.randint(3, config.vocab_size, (total,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [IGNORED_LABEL] * prompt + ids[prompt:]})
    return examples


def split(examples: Sequence[Any], size: int) -> list[list[int]]:
    """Return the indices of each batch."""
    return [list(range(start, start + size)) for start in range(0, len(examples), size)]


def stacked(
    examples: list[dict[str, Any]], device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Return a batch of examples that are equally long."""
    ids = torch.tensor([example["input_ids"] for example in examples], device=device)
    labels = torch.tensor([example["labels"] for example in examples], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted(base: Any, method: Method, shape: Shape) -> Any:
    """Return the base with the method's adapter, ready to train."""
    config: Any = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    if method.trains == "loreft":
        config = ReftConfig(
            task_type="CAUSAL_LM",
            rank=4,
            layers=shape.layers,
            positions=shape.positions,
            init="paper",
        )
    torch.manual_seed(0)
    model: Any = get_peft_model(base, config)
    if method.checkpointing:
        enable_activation_checkpointing(model)
    if method.our_loss:
        use_chunked_loss(model)
    return model.train()


@dataclass(kw_only=True)
class Stepper:
    """Takes optimizer steps (AdamW) on batches in turn, and says how long each took."""

    model: Any
    """With an adapter."""
    loss: Callable[[int], torch.Tensor]
    """The training loss of a batch."""
    num_batches: int
    """Batches there are."""

    def __post_init__(self) -> None:
        """Make the optimizer."""
        self.device = device_of(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def __call__(self, number: int) -> float:
        """Take a step and return its seconds."""
        started = now(self.device)
        self.loss(number % self.num_batches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return now(self.device) - started


def plain_stepper(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> Stepper:
    """Return a stepper of the model as it is."""
    return Stepper(
        model=model, loss=lambda i: model(**batches[i])["loss"], num_batches=len(batches)
    )


def reused_stepper(
    reuse: Reuse, batches: Sequence[Sequence[int]], *, ahead: bool = True
) -> Stepper:
    """Return a stepper that starts from stored constants.

    Args:
        reuse: What is stored.
        batches: Examples of each.
        ahead: Whether the next batch is read while one trains, as ``train`` does.
    """

    def loss(number: int) -> torch.Tensor:
        value = reuse.loss(batches[number])
        if ahead:
            reuse.announce(batches[(number + 1) % len(batches)])
        return value

    return Stepper(model=reuse.model, loss=loss, num_batches=len(batches))


def take_turns(
    steps: Mapping[Key, Callable[[int], float]], *, rounds: int, turn_s: float
) -> dict[Key, list[float]]:
    """Let every method take steps in turn, forwards and backwards, after a round that is a warm-up.

    Args:
        steps: Takes the step of a number and returns its seconds.
        rounds: Rounds that count.
        turn_s: A method goes on with its next step until this many seconds have passed.

    Returns:
        Per method the seconds of each round: the median of its steps.
    """
    seconds: dict[Key, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in steps if number % 2 else reversed(list(steps)):
            turn = [steps[name](number)]
            while sum(turn) < turn_s:
                turn.append(steps[name](number + len(turn)))
            if number:
                seconds[name].append(statistics.median(turn))
    return seconds


def block_arithmetic(config: Any, shape: Shape, method: Method) -> int:
    """Return the products of one step's tokens with blocks."""
    first = 0 if method.trains == "qlora" else shape.lowest + 1
    trained = config.num_hidden_layers - first
    if method.reused:
        return 2 * trained * shape.kept
    return shape.tokens * (config.num_hidden_layers + trained * (2 if method.checkpointing else 1))


def arithmetic(config: Any, shape: Shape, method: Method) -> float:
    """Return the products of one step, the head's included, in tokens through one block."""
    supervised = shape.batch_size * shape.response
    logits = supervised if method.our_loss else shape.tokens
    return block_arithmetic(config, shape, method) + 2 * logits * _blocks_in_head(config)


def build_arithmetic(config: Any, shape: Shape) -> float:
    """Return the products that store one step's constants, in tokens through one block.

    All tokens run up to the lowest edited block, and those before the first edit above it too.
    """
    constant = shape.lowest + 1
    above = config.num_hidden_layers - constant
    return constant * shape.tokens + above * (shape.tokens - shape.kept)


def gain(config: Any, shape: Shape, method: Method, speed_up: float) -> dict[str, float]:
    """Return a reused step's speed-up over a method's with the ratios of their arithmetic."""
    limit = arithmetic(config, shape, method) / arithmetic(config, shape, REUSED)
    blocks = [block_arithmetic(config, shape, each) for each in (method, REUSED)]
    return {
        "speed_up": speed_up,
        "limit": limit,
        "share_of_limit": speed_up / limit,
        "arithmetic_ratio": blocks[0] / blocks[1],
    }


def _blocks_in_head(config: Any) -> float:
    """Return the weights of the output head over those of a block (Llama)."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    attention = 2 * hidden * head_dim * (heads + config.num_key_value_heads)
    block = attention + 3 * hidden * config.intermediate_size
    return float(config.vocab_size * hidden / block)
