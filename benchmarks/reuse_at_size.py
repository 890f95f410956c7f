"""Steps of reused and of other training at the shapes of real models, one method after the other.

``benchmarks.reuse`` says what is measured.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import nn

from benchmarks.common import free, measured_or_error, say, summarize, tiny_llama
from benchmarks.reuse_steps import (
    EIGHT,
    PLAIN,
    QLORA,
    QLORA_CHECKPOINTED,
    QLORA_OURS,
    REUSED,
    SEVENTY,
    Method,
    ReuseBenchmark,
    Shape,
    Stepper,
    adapted,
    gain,
    make_examples,
    plain_stepper,
    reused_stepper,
    split,
    stacked,
)
from lowmem_reft.base import count_as_stored
from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.residency import Residency
from lowmem_reft.base.synthetic import base_on_meta, base_with_random_weights
from lowmem_reft.memory.planner import GIB, Planner, read_config
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.memory.profile import measure_step
from lowmem_reft.options import MemoryOptions, MethodOptions
from lowmem_reft.reuse.disk import ReuseError
from lowmem_reft.reuse.proof import prove
from lowmem_reft.reuse.reuse import Reuse

DTYPE = torch.bfloat16
WARM_UP_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement."""

    method: Method
    """How its steps train."""
    shape: Shape
    """On what."""
    autocast: bool = False
    """Whether it runs in bf16 autocast."""
    upper: bool = False
    """Whether only the blocks above the edited one are on the device."""
    limit_gib: float | None = None
    """Device memory that it may take."""

    @property
    def label(self) -> str:
        """Say it in words."""
        parts = [self.method.label]
        if self.autocast:
            parts.append("autocast")
        if self.upper:
            parts.append("upper blocks resident")
        if self.limit_gib is not None:
            parts.append(f"{self.limit_gib:g} GiB")
        return ", ".join(parts)

    @property
    def facts(self) -> dict[str, Any]:
        """What it is, for the result."""
        return {
            "method": self.label,
            "shape": self.shape.name,
            "autocast": self.autocast,
            "resident": "upper" if self.upper else "all",
            "limit_gib": self.limit_gib,
        }


def config_of(options: ReuseBenchmark) -> Any:
    """Return the shape of the base."""
    shape = options.at_size.shape or EIGHT
    if not options.small:
        return read_config(shape)
    return tiny_llama(4 if shape == EIGHT else 5)


def rows_of(options: ReuseBenchmark, config: Any) -> list[Row]:
    """Return what is measured, in order."""
    sizes, layers = options.at_size, config.num_hidden_layers
    is_large = sizes.shape == SEVENTY
    edited = layers * 3 // 4 if is_large else layers // 2 - 1
    divisor = 64 if options.small else 1
    one = Shape(
        name=f"layer {edited}, l1",
        prompt=sizes.prompt // divisor,
        response=sizes.response // divisor,
        batch_size=sizes.batch_size or (2 if is_large else 4),
        layers=f"{edited}",
        positions="l1",
        lowest=edited,
    )
    if is_large:
        limit = sizes.limit_gib
        return [
            Row(method=REUSED, shape=one, upper=True, limit_gib=limit),
            Row(method=QLORA_CHECKPOINTED, shape=one, limit_gib=limit),
            Row(method=QLORA_CHECKPOINTED, shape=one),
            Row(method=QLORA_CHECKPOINTED, shape=one, autocast=True),
        ]
    half = replace(
        one, name="upper half, all", layers="upper:0.5", positions="all", lowest=layers // 2
    )
    peers = [
        Row(method=method, shape=one, autocast=autocast)
        for method in (QLORA, QLORA_CHECKPOINTED)
        for autocast in (False, True)
    ]
    peers.insert(0, Row(method=QLORA_OURS, shape=one))
    ours = [Row(method=method, shape=shape) for shape in (one, half) for method in (REUSED, PLAIN)]
    # What there may be no time for comes last.
    return [Row(method=REUSED, shape=one, upper=True), *ours, *reversed(peers)]


class RandomCheckpoint:
    """Stands for a checkpoint of random weights that is read in parts, and is nowhere.

    Args:
        config: Of the whole base.
        device: Where blocks go.
    """

    def __init__(self, config: Any, device: torch.device) -> None:
        self.config = config
        self.device = device

    def block(self, index: int) -> nn.Module:
        """Draw a block as it is stored, the same one every time."""
        made = self._base(num_layers=1, vocab_size=8, seed=index + 1)
        block: nn.Module = find_blocks(made)[1][0]
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
        return block

    def embedding(self) -> nn.Module:
        """Draw the input embedding, into host memory."""
        generator = torch.Generator(self.device).manual_seed(0)
        size = (self.config.vocab_size, self.config.hidden_size)
        table = torch.empty(size, dtype=DTYPE, device=self.device)
        return nn.Embedding.from_pretrained(table.normal_(std=0.02, generator=generator).cpu())

    def digest(self) -> str:
        """Say what it is."""
        return "random"

    def rest(self) -> Any:
        """Draw a base of one block, for what is neither a block nor the embedding."""
        return self._base(num_layers=1, vocab_size=self.config.vocab_size, seed=0)

    def _base(self, *, num_layers: int, vocab_size: int, seed: int) -> Any:
        config = copy.deepcopy(self.config)
        config.num_hidden_layers, config.vocab_size = num_layers, vocab_size
        return base_with_random_weights(
            config, device=self.device, seed=seed, storage="nf4", compute_dtype=DTYPE
        )


def upper_base(config: Any, first: int, device: torch.device) -> Any:
    """Return a random base whose blocks from ``first`` on are there, as ``load_base`` leaves it."""
    base: Any = base_on_meta(copy.deepcopy(config), storage="nf4", compute_dtype=DTYPE)
    checkpoint: Any = RandomCheckpoint(config, device)
    blocks = find_blocks(base)[1]
    for index, block in enumerate(blocks):
        if index >= first:
            blocks[index] = checkpoint.block(index)
            continue
        for module in block.modules():
            if isinstance(module, Linear4bit):
                count_as_stored(module)
    drawn = checkpoint.rest()
    for mine, other in ((base, drawn), (base.base_model, drawn.base_model)):
        for child, module in other.named_children():
            if module not in (
                drawn.base_model,
                find_blocks(drawn)[1],
                drawn.get_input_embeddings(),
            ):
                setattr(mine, child, module)
    Residency(base, checkpoint, first_resident=first, has_embedding=False).begin()
    return base.eval()


def base_for(row: Row, config: Any, device: torch.device) -> Any:
    """Return the base that a row trains on."""
    if row.upper:
        return upper_base(config, row.shape.lowest + 1, device)
    return base_with_random_weights(
        copy.deepcopy(config), device=device, storage="nf4", compute_dtype=DTYPE
    )


def measured(
    row: Row, options: ReuseBenchmark, device: torch.device, directory: Path
) -> dict[str, Any]:
    """Measure one row, alone on the device."""
    config, shape = config_of(options), row.shape
    model = adapted(base_for(row, config, device), row.method, shape)
    examples = make_examples(config, shape, shape.batch_size * options.batches)
    indices = split(examples, shape.batch_size)
    facts: dict[str, Any] = {}
    batch: dict[str, torch.Tensor] = {}
    if row.method.reused:
        built, facts = build(model, examples, directory, device)
        step = reused_stepper(built, indices)
    else:
        batches = [stacked([examples[i] for i in part], device) for part in indices]
        batch, step = batches[0], plain_stepper(model, batches)
    if row.autocast:
        step = replace(step, loss=partial(in_autocast, step.loss, device))
    return facts | timed(step, shape, batch, repeats=options.repeats or 5)


def in_autocast(
    loss: Callable[[int], torch.Tensor], device: torch.device, number: int
) -> torch.Tensor:
    """Return the loss of a batch, computed in bf16 autocast."""
    with torch.autocast(device.type, DTYPE):
        return loss(number)


def build(
    model: Any, examples: Sequence[Any], directory: Path, device: torch.device
) -> tuple[Reuse, dict[str, Any]]:
    """Store what is constant, and compare a step from it with the plain one."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    reuse = Reuse(model, examples, directory)
    facts: dict[str, Any] = {
        "mode": reuse.mode,
        "build_time_s": reuse.build_time_s,
        "build_tokens": sum(len(example["input_ids"]) for example in examples),
        "store_bytes": reuse.layout.total_bytes,
    }
    if device.type == "cuda":
        facts["build_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    try:
        facts["max_grad_rel_error"] = prove(reuse, [0], stacked([examples[0]], device))
    except (ReuseError, torch.OutOfMemoryError) as error:  # the times are worth knowing still
        facts["proof_error"] = str(error).splitlines()[0]
    free(device)
    return reuse, facts


def timed(
    step: Stepper, shape: Shape, batch: dict[str, torch.Tensor], *, repeats: int
) -> dict[str, Any]:
    """Return memory and times of a stepper's steps."""
    for number in range(WARM_UP_STEPS):
        step(number)
    peak, held = measure_step(step.device, step.model, step.optimizer, batch, partial(step, 0))
    seconds = summarize([step(number) for number in range(repeats)])
    return {
        "peak_bytes": peak.allocated_bytes + held,
        "reserved_bytes": peak.reserved_bytes,
        **seconds,
        "tokens_per_s": shape.tokens / seconds["median_s"],
    }


def predicted_bytes(row: Row, config: Any, device: torch.device) -> int:
    """Return the predicted peak of a row's step, in bytes."""
    shape = row.shape
    method = MethodOptions(method="qlora", rank=16)
    if row.method.trains == "loreft":
        method = MethodOptions(
            method="loreft", rank=4, layers=shape.layers, positions=shape.positions
        )
    setting = Setting(
        method=method,
        memory=MemoryOptions(activation_checkpointing=row.method.checkpointing),
        chunked_loss=row.method.our_loss,
        reuse="prefix" if row.method.reused else "off",
        resident="upper" if row.upper else "all",
        device_type=device.type,
    )
    lengths = Lengths(
        seq_len=shape.prompt + shape.response,
        response_len=shape.response,
        batch_size=shape.batch_size,
        padded=False,
    )
    return Planner(config).training_peak_bytes(setting, lengths)


@contextmanager
def at_most(limit_gib: float | None, device: torch.device) -> Iterator[None]:
    """Let the allocator take so much of the card, and no more."""
    if limit_gib is None or device.type != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * GIB / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def measure_rows(
    options: ReuseBenchmark,
    device: torch.device,
    directory: Path,
    started: float,
    keep_rows: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Measure every row; out of memory is a row, and so is what there was no time for.

    ``keep_rows`` is given all rows so far after each.
    """
    config, sizes = config_of(options), options.at_size
    results = []
    for number, row in enumerate(rows_of(options, config)):
        if sizes.methods is not None and sizes.methods not in row.label:
            continue
        facts = row.facts
        in_time = time.perf_counter() - started <= sizes.seconds
        if in_time and (row.method.reused or row.limit_gib is not None):
            facts["predicted_bytes"] = predicted_bytes(row, config, device)
        with at_most(row.limit_gib, device):
            facts |= measured_or_error(
                partial(measured, row, options, device, directory / f"{number}"),
                started=started,
                seconds=sizes.seconds,
            )
        free(device)
        shutil.rmtree(directory / f"{number}", ignore_errors=True)
        results.append(facts)
        keep_rows(results)
        say(f"{facts['shape']:16} {facts['method']:44} {said(facts)}")
    return results


def said(facts: dict[str, Any]) -> str:
    """Return what was measured in words."""
    line: str | None = facts.get("error")
    if line is None:
        reserved = facts["reserved_bytes"] or 0
        line = (
            f"{facts['tokens_per_s']:9,.0f} tokens/s, peak {facts['peak_bytes'] / GIB:7.3f} GiB, "
            f"reserved {reserved / GIB:7.3f}"
        )
        if "build_time_s" in facts:
            error = facts.get("max_grad_rel_error", facts.get("proof_error"))
            line += f", built in {facts['build_time_s']:.1f} s, gradients {error}"
    if "predicted_bytes" in facts:
        line += f" (predicted {facts['predicted_bytes'] / GIB:.3f} GiB)"
    return line


def gains_of(
    options: ReuseBenchmark, results: list[dict[str, Any]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by shape and method, how many times more tokens per second reused steps train on.

    Of rows that differ in autocast, or in where blocks are, the fastest counts. QLoRA trains all
    blocks on all tokens, so its step is the same for every shape.
    """
    config = config_of(options)
    speeds: dict[Shape, dict[Method, float]] = {}
    rows = {row.label + row.shape.name: row for row in rows_of(options, config)}
    shapes = dict.fromkeys(row.shape for row in rows.values())
    for facts in results:
        row = rows[facts["method"] + facts["shape"]]
        for shape in shapes if row.method.trains == "qlora" else (row.shape,):
            known = speeds.setdefault(shape, {})
            speed = facts.get("tokens_per_s", 0.0)
            known[row.method] = max(speed, known.get(row.method, 0.0))
    return {
        shape.name: {
            method.label: gain(config, shape, method, known[REUSED] / speed)
            for method, speed in known.items()
            if speed and method != REUSED
        }
        for shape, known in speeds.items()
        if known.get(REUSED)
    }


def measure_at_size(
    options: ReuseBenchmark,
    device: torch.device,
    directory: Path,
    keep_rows: Callable[[list[dict[str, Any]]], None],
) -> dict[str, Any]:
    """Measure every row, and say what reused steps gain."""
    started = time.perf_counter()
    rows = measure_rows(options, device, directory, started, keep_rows)
    gains = gains_of(options, rows)
    for shape, methods in gains.items():
        for method, each in methods.items():
            times, limit = f"{each['speed_up']:.2f}", f"{each['limit']:.1f}"
            say(f"{shape}: {times} times {method}, of {limit} possible")
    wall_s = time.perf_counter() - started
    return {"model": options.at_size.shape, "rows": rows, "gains": gains, "wall_s": wall_s}
