"""What ``train --reuse`` would store, cost and save: sums of sizes, nothing is measured.

Work is counted in blocks times tokens: the products of one block with one token, forward. The
gradient of a frozen block takes as many again; a recomputed one (checkpointing) is one forward
more. The output head counts as the part of a block that its matrix is. Not counted: the product of
queries with stored keys, the adapter, reading the store and, on short batches, dequantizing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from lowmem_reft.base.blocks import base_of, find_blocks
from lowmem_reft.base.quantization import dequantized_bytes
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.methods.constant import lower_part
from lowmem_reft.reuse.disk import ReuseError
from lowmem_reft.reuse.layout import Layout, Shape
from lowmem_reft.reuse.split import Example, find_constant

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from lowmem_reft.memory.predict import Lengths, Predictor


@dataclass(frozen=True, kw_only=True)
class ReusePlan:
    """What one setting could reuse of a data set whose examples are all of the same length."""

    mode: Literal["prefix", "trunk"]
    """What is stored: see ``options.ReuseOptions.reuse``."""
    num_constant_blocks: int
    """Blocks whose outputs training does not change; it starts above them."""
    num_examples: int
    """Examples of the data set."""
    store_bytes_per_example: int
    """Disk space of the constants of one example."""
    store_bytes: int
    """The same of all; less where examples begin alike, which is stored once."""
    build_steps: float
    """Ordinary optimizer steps of the same batch that take as much arithmetic as the build:
    see `Work.build_steps`."""
    resident_bytes: int
    """Frozen weights and their constants that a reused step needs on the device: blocks above the
    trunk, norms and head. The lower blocks, and an embedding that the head does not share, may
    leave it (``train --resident upper``)."""
    dequantized_bytes: int
    """What ``train --dequantize-upper on`` takes besides: the 4-bit layers of the blocks above the
    trunk in the compute dtype; 0 without any."""
    speedup_per_epoch: float
    """Arithmetic of a plain epoch over that of a reused one, the build left out: see
    `Work.speedup`. Computed, not measured."""

    def as_json(self) -> dict[str, Any]:
        """Return the figures for ``--json``."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Work:
    """The arithmetic of one example, in blocks times tokens."""

    num_blocks: int
    """L: all blocks."""
    num_constant_blocks: int
    """k: those below the lowest trained parameter."""
    num_tokens: int
    """S: tokens of an example."""
    num_constant_tokens: int
    """P: tokens whose keys and values are stored; 0 without a prefix."""
    recomputed: float
    """r: share of the blocks that checkpointing runs again in the backward pass."""
    plain_head: float
    """H: blocks times tokens of the head, forward, in a plain step."""
    reused_head: float
    """H': the same in a reused step."""

    @property
    def plain(self) -> float:
        """Return L·S + (1 + r)·(L - k)·S + 2·H: nothing is back-propagated below the trunk."""
        upper = self.num_blocks - self.num_constant_blocks
        passes = self.num_blocks + (1 + self.recomputed) * upper
        return passes * self.num_tokens + 2 * self.plain_head

    @property
    def reused(self) -> float:
        """Return (2 + r)·(L - k)·(S - P) + 2·H': upper blocks on what is not constant."""
        upper = self.num_blocks - self.num_constant_blocks
        kept = self.num_tokens - self.num_constant_tokens
        return (2 + self.recomputed) * upper * kept + 2 * self.reused_head

    @property
    def build(self) -> float:
        """Return k·S, or L·S where keys and values of the upper blocks are stored as well."""
        through = self.num_blocks if self.num_constant_tokens else self.num_constant_blocks
        return through * self.num_tokens

    @property
    def speedup(self) -> float:
        """Return plain / reused."""
        return self.plain / self.reused

    def build_steps(self, num_examples: int, examples_per_step: int) -> float:
        """Return N · build / (B · plain), for N examples and B examples per optimizer step."""
        return num_examples * self.build / (examples_per_step * self.plain)


def plan_reuse(predictor: Predictor, lengths: Lengths, num_examples: int) -> ReusePlan | None:
    """Say what training could reuse; None if nothing is constant.

    The adapter of the predictor's setting, and its ways to save memory, decide what is constant;
    every example is as long as ``lengths`` says.
    """
    model, setting = predictor.model, predictor.setting
    causal = setting.task_type == "CAUSAL_LM"
    seq_len, examples_per_step = lengths.seq_len, lengths.batch_size * lengths.gradient_accumulation
    response_len = min(lengths.num_supervised, seq_len - 1)
    labels = [IGNORED_LABEL] * (seq_len - response_len) + [0] * response_len
    example: Example = {"input_ids": [0] * seq_len, "labels": labels if causal else 0}
    try:
        split = find_constant(model, [example], prefix=True)
    except ReuseError:
        return None
    shape = Shape(split.first_edited[0], seq_len - split.first_edited[0])
    base = base_of(model)
    blocks = find_blocks(base)[1]
    dtype = base.get_input_embeddings().weight.dtype
    layout = Layout.of(base, split.num_blocks, [shape], dtype)
    scored = response_len if causal else 1
    chunked = setting.chunked_loss or not causal  # else logits of all tokens
    head = len(blocks) * _num_weights(_above_the_backbone(base)) / _num_weights([blocks])
    memory = setting.memory
    work = Work(
        num_blocks=len(blocks),
        num_constant_blocks=split.num_blocks,
        num_tokens=seq_len,
        num_constant_tokens=shape.prefix,
        recomputed=1 / memory.checkpoint_every if memory.activation_checkpointing else 0.0,
        plain_head=head * (scored if chunked else seq_len),
        reused_head=head * (scored if chunked else shape.suffix),
    )
    return ReusePlan(
        mode="prefix" if shape.prefix else "trunk",
        num_constant_blocks=split.num_blocks,
        num_examples=num_examples,
        store_bytes_per_example=layout.num_bytes(0),
        store_bytes=num_examples * layout.num_bytes(0),
        build_steps=work.build_steps(num_examples, examples_per_step),
        resident_bytes=predictor.held_bytes([model])
        - predictor.held_bytes(lower_part(base, split.num_blocks)),
        dequantized_bytes=dequantized_bytes(blocks[split.num_blocks :], dtype),
        speedup_per_epoch=work.speedup,
    )


def _above_the_backbone(base: Any) -> list[nn.Module]:
    """Return what runs after the blocks: the language head, or a classifier's."""
    backbone = find_blocks(base)[0].partition(".")[0]
    return [module for name, module in base.named_children() if name != backbone]


def _num_weights(modules: Iterable[nn.Module]) -> int:
    """Return the frozen numbers in modules; a 4-bit weight, two to a byte, counts in full."""
    frozen = {p for module in modules for p in module.parameters() if not p.requires_grad}
    shapes = (getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in frozen)
    return sum(shape.numel() for shape in shapes)
