"""Predicted against measured peak memory, and where the bytes of a step are.

Run ``python -m benchmarks.memory``. On the CPU the measure is independent of any count of ours: the
allocator's own events, recorded by torch.profiler, on top of the tensors that were there before.
The grid is 3 architectures x storage x method x checkpointing x lengths and batch sizes. The
second part is one shape, batch 4 x (192 prompt + 64 response), vocabulary 32,000, d = 1024, 16
layers: peak over weights of LoReFT and QLoRA with their own loss and with ours.

Goals: never under, at most 3 % over; LoReFT with checkpointing at most 180 MiB over the weights in
fp32, at most 100 MiB in bf16.

Run ``python -m benchmarks.memory --device cuda --model llama-3.1-8b`` (also qwen3-14b,
llama-3.3-70b) for memory and speed on a card at the shapes of real models. Weights are random and
drawn as they are stored, so no checkpoint is needed and nothing is ever there in full precision.
Methods: LoReFT with each way to save memory, PEFT QLoRA, and LoRA on a 16-bit base, at 512, 2,048
and 8,192 tokens; a row that runs out of memory is a row. ``--seconds`` bounds the whole command.
Where only upper blocks are on the card is measured by ``benchmarks.reuse``.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from transformers import AutoConfig

from benchmarks.common import (
    environment,
    failed,
    finish,
    free,
    keep,
    measured_or_error,
    now,
    say,
    summarize,
    tiny_llama,
    write,
)
from lowmem_reft.base.blocks import device_of
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import resolve_device
from lowmem_reft.memory.live import LiveMemory, label_model
from lowmem_reft.memory.planner import GIB, Planner, read_config
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.memory.profile import build_model, measure_step
from lowmem_reft.memory.step import make_batch, training_step, warm_up
from lowmem_reft.options import MemoryOptions, MethodOptions

LOREFT = MethodOptions(method="loreft", rank=4, layers="all", positions="f7+l7")
LOREFT_ALL = MethodOptions(method="loreft", rank=4, layers="all", positions="all")
LOREFT_UPPER = MethodOptions(method="loreft", rank=4, positions="l1", layers="upper:0.5")
QLORA, LORA = MethodOptions(method="qlora", rank=16), MethodOptions(method="lora", rank=16)
METHODS = {
    "LoReFT f7+l7": LOREFT,
    "LoReFT all": LOREFT_ALL,
    "LoReFT upper half l1": LOREFT_UPPER,
    "QLoRA r16": QLORA,
}
MIB = 2**20
PLAIN, CHECKPOINTED = MemoryOptions(), MemoryOptions(activation_checkpointing=True)
CHUNKED = MemoryOptions(activation_checkpointing=True, mlp_tokens=256)
FRUGAL = MemoryOptions(
    activation_checkpointing=True,
    offload_activations=True,
    mlp_tokens=4096,
    embedding_on_host=True,
)
BATCHES = ((1, 512, False), (4, 128, True))
"""Batch size, tokens, and whether an example is shorter than the others."""
OFFLOADED = replace(CHECKPOINTED, offload_activations=True)
ON_HOST = replace(CHECKPOINTED, embedding_on_host=True)
REAL = {
    "LoReFT f7+l7": Setting(method=LOREFT, memory=CHECKPOINTED),
    "PEFT QLoRA r16": Setting(method=QLORA, memory=CHECKPOINTED, chunked_loss=False),
    "QLoRA r16, our loss": Setting(method=QLORA, memory=CHECKPOINTED),
    "LoReFT upper half l1": Setting(method=LOREFT_UPPER, memory=CHECKPOINTED),
    "LoReFT, no checkpointing": Setting(method=LOREFT),
    "LoReFT, offloaded activations": Setting(method=LOREFT, memory=OFFLOADED),
    "LoReFT, embedding on host": Setting(method=LOREFT, memory=ON_HOST),
    "LoReFT, MLP in parts": Setting(method=LOREFT, memory=replace(CHECKPOINTED, mlp_tokens=4096)),
    "LoReFT, every way to save": Setting(method=LOREFT, memory=FRUGAL),
    "LoReFT all": Setting(method=LOREFT_ALL, memory=CHECKPOINTED),
    "LoReFT, int8 base": Setting(storage="int8", method=LOREFT, memory=CHECKPOINTED),
    "PEFT LoRA r16, bf16 base": Setting(
        storage="bf16", method=LORA, memory=CHECKPOINTED, chunked_loss=False
    ),
}
"""What is measured at a real model's shape."""


@dataclass(frozen=True, kw_only=True)
class MemoryBenchmark:
    """Measure predicted and real peaks."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where."""
    model: str | None = None
    """Measure at this model's shape in place of the grid: short name, hub id, directory or
    config.json; default on a card: llama-3.1-8b."""
    tokens: str = "512,2048,8192"
    """At a model's shape: comma-separated lengths of the one example of a batch."""
    methods: tuple[str, ...] = ()
    """At a model's shape: only methods whose label contains one of these."""
    repeats: int = 3
    """At a model's shape: timed steps after two that are not counted."""
    seconds: float = 480
    """At a model's shape: rows that would start later than this are left out, and named."""
    small: bool = False
    """A quarter of the grid on small shapes, and no second part; at a model's shape a tiny one in
    its place, and a 64th of the tokens."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/memory.json, or memory-MODEL.json)."""


def config_of(architecture: str, width: int, layers: int, vocab: int) -> Any:
    """Return a configuration of the architecture with these sizes."""
    heads = width // 64
    if architecture == "gpt2":
        return AutoConfig.for_model(
            "gpt2",
            vocab_size=vocab,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    return AutoConfig.for_model(
        architecture,
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4 or 1,
        head_dim=64,
    )


def grid(
    *, small: bool
) -> Iterator[tuple[str, str, str, str, MemoryOptions, tuple[int, int, bool]]]:
    """Yield architecture, storage, compute dtype, method, ways to save memory, batch."""
    bases = (("nf4", "fp32"), ("nf4", "bf16"), ("fp32", "fp32"), ("int8", "fp32"))
    cells = itertools.product(
        ("llama", "gemma2", "gpt2"), bases, METHODS, (PLAIN, CHECKPOINTED), BATCHES
    )
    for number, (architecture, (storage, dtype), method, memory, batch) in enumerate(cells):
        # Of the two batches one each in turn; a quarter of the settings where it must be quick.
        if number % 2 == number // 2 % 2 and (not small or number % 28 in (0, 3, 7, 8)):
            yield architecture, storage, dtype, method, memory, batch


def measured_step(
    config: Any, setting: Setting, build: Callable[[], Any], lengths: Lengths, *, repeats: int = 0
) -> dict[str, Any]:
    """Predict a model's step and measure it; its times too, if it is repeated."""
    model = build()
    device = device_of(model)
    predicted = Planner(config).training_peak_bytes(setting, lengths)
    batch = make_batch(
        lengths.batch_size,
        lengths.seq_len,
        lengths.num_supervised,
        padded=bool(lengths.padded),
        vocab_size=config.vocab_size,
    )
    batch = {key: value.to(device) for key, value in batch.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    warm_up(model, optimizer)
    step = partial(training_step, model, batch, optimizer)
    step()
    peak, held_bytes = measure_step(device, model, optimizer, batch, step)
    measured = peak.allocated_bytes + held_bytes
    row: dict[str, Any] = {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "ratio": predicted / measured,
    }
    if repeats:
        seconds = []
        for _ in range(repeats):
            started = now(device)
            step()
            seconds.append(now(device) - started)
        row |= {"reserved_bytes": peak.reserved_bytes, **summarize(seconds)}
        row["tokens_per_s"] = lengths.batch_size * lengths.seq_len / row["median_s"]
    return row


def cell(
    config: Any, setting: Setting, size: tuple[int, int, bool], response_len: int
) -> dict[str, Any]:
    """Predict and measure one setting, and say where its bytes are."""
    batch_size, seq_len, padded = size
    lengths = Lengths(
        seq_len=seq_len, batch_size=batch_size, padded=padded, response_len=response_len
    )
    peak = Planner(config).predictor(setting).training(lengths).peak
    torch.manual_seed(0)
    model = build_model(config, setting, torch.device("cpu"), random_weights=True)
    gc.collect()
    row = measured_step(config, setting, lambda: model, lengths)
    held = LiveMemory("cpu")
    label_model(held, model)
    base_bytes = held.by_category["weights"] + held.by_category["quantization_constants"]
    return {
        **row,
        "base_bytes": base_bytes,
        "breakdown_bytes": peak.breakdown_bytes,
        "place": str(peak.place),
    }


def accuracy(options: MemoryBenchmark) -> list[dict[str, Any]]:
    """Predict and measure the grid."""
    rows = []
    width, layers, vocab = (128, 2, 512) if options.small else (512, 6, 8192)
    for architecture, storage, dtype, method, memory, size in grid(small=options.small):
        setting = Setting(
            storage=storage,
            compute_dtype=dtype,
            method=METHODS[method],
            memory=memory,
            device_type="cpu",
        )
        config = config_of(architecture, width, layers, vocab)
        row = {
            "architecture": architecture,
            "storage": storage,
            "compute_dtype": dtype,
            "method": method,
            "checkpointing": memory.activation_checkpointing,
            "batch": list(size),
            **cell(config, setting, size, 64),
        }
        rows.append(row)
        say(
            f"{architecture:7} {storage:5} {dtype:5} {method:21} "
            f"{'checkpointed' if memory.activation_checkpointing else 'plain':13} {size!s:15} "
            f"{row['predicted_bytes'] / MIB:9.2f} {row['measured_bytes'] / MIB:9.2f} MiB "
            f"{row['ratio']:.4f}"
        )
    return rows


def floor() -> list[dict[str, Any]]:
    """Say where the bytes of one step of the 246 M-parameter shape are."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=1024,
        num_hidden_layers=16,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    cells = (
        ("LoReFT f7+l7, model's own loss", LOREFT, "fp32", CHECKPOINTED, False),
        ("LoReFT f7+l7", LOREFT, "fp32", CHECKPOINTED, True),
        ("LoReFT f7+l7, MLP in parts", LOREFT, "fp32", CHUNKED, True),
        ("LoReFT f7+l7, bf16 compute", LOREFT, "bf16", CHECKPOINTED, True),
        ("LoReFT all", LOREFT_ALL, "fp32", CHECKPOINTED, True),
        ("LoReFT f7+l7, no checkpointing", LOREFT, "fp32", PLAIN, True),
        ("QLoRA r16, PEFT's defaults", QLORA, "fp32", CHECKPOINTED, False),
        ("QLoRA r16, our loss", QLORA, "fp32", CHECKPOINTED, True),
        ("QLoRA r16, our loss, bf16 compute", QLORA, "bf16", CHECKPOINTED, True),
    )
    rows = []
    for label, method, dtype, memory, chunked in cells:
        setting = Setting(
            compute_dtype=dtype,
            method=method,
            memory=memory,
            chunked_loss=chunked,
            device_type="cpu",
        )
        row = {"label": label, **cell(config, setting, (4, 256, False), 64)}
        row["over_weights_bytes"] = row["measured_bytes"] - row["base_bytes"]
        rows.append(row)
        say(
            f"{label:36} measured {row['over_weights_bytes'] / MIB:7.1f} MiB over weights, "
            f"predicted/measured {row['ratio']:.4f}  {row['place']}"
        )
    return rows


def at_shape_of(
    model: str,
    options: MemoryBenchmark,
    device: torch.device,
    keep_rows: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Measure every method at every length at a real model's shape; out of memory is a row.

    ``keep_rows`` is given all rows so far after each.
    """
    started = time.perf_counter()
    config = tiny_llama(2) if options.small else read_config(model)
    rows: list[dict[str, Any]] = []
    for label, each in REAL.items():
        if options.methods and not any(part in label for part in options.methods):
            continue
        setting = replace(each, device_type=device.type)
        build = cache(partial(build_model, config, setting, device, random_weights=True))
        for tokens in map(int, options.tokens.split(",")):
            tokens = tokens // 64 if options.small else tokens
            lengths = Lengths(seq_len=tokens, response_len=tokens // 4, padded=False)
            measure = partial(
                measured_step, config, setting, build, lengths, repeats=options.repeats
            )
            row = {"method": label, "tokens": tokens}
            row |= measured_or_error(measure, started=started, seconds=options.seconds)
            free(device)
            rows.append(row)
            keep_rows(rows)
            say(f"{label:34} {tokens:6} {row.get('error') or said(row)}")
        build.cache_clear()
        free(device)
    return rows


def said(row: dict[str, Any]) -> str:
    """Return memory and speed in words."""
    return (
        f"predicted {row['predicted_bytes'] / GIB:7.3f} GiB, measured "
        f"{row['measured_bytes'] / GIB:7.3f} (ratio {row['ratio']:.4f}), reserved "
        f"{(row['reserved_bytes'] or 0) / GIB:7.3f}, {row['tokens_per_s']:8.0f} tokens/s"
    )


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Scatter predicted over measured against measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for marker, method in zip("osD^", METHODS, strict=True):
        chosen = [row for row in rows if row["method"] == method]
        axes.scatter(
            [row["measured_bytes"] / MIB for row in chosen],
            [100 * (row["ratio"] - 1) for row in chosen],
            label=method,
            marker=marker,
            s=22,
            alpha=0.8,
        )
    axes.axhline(0, color="black", linewidth=1)
    axes.axhline(3, color="grey", linewidth=1, linestyle="--")
    axes.set_xlabel("measured peak, MiB (allocator events)")
    axes.set_ylabel("prediction above the measurement, %")
    axes.set_title(f"{len(rows)} settings: never under, at most 3 % over")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return path


def run_grid(result: dict[str, Any], options: MemoryBenchmark) -> int:
    """Measure the grid, print the summary and one JSON line; 1 if one is under or far over."""
    rows = accuracy(options)
    ratios = [row["ratio"] for row in rows]
    result |= {
        "num_settings": len(rows),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "num_under": sum(ratio < 1 for ratio in ratios),
        "rows": rows,
    }
    if not options.small:
        result["floor"] = floor()
    if options.output is not None:
        write(result, options.output)
        draw(rows, options.output.with_suffix(".png"))
    say(f"{len(rows)} settings: predicted / measured from {min(ratios):.4f} to {max(ratios):.4f}")
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    return int(min(ratios) < 1 or max(ratios) > 1.03)


def main(options: MemoryBenchmark) -> int:
    """Print what was measured and one JSON line; 1 if a row failed, 2 without such a device."""
    try:
        device = resolve_device(options.device)
    except InputError as error:
        say(f"benchmarks.memory: {error}")
        return 2
    model = options.model or ("llama-3.1-8b" if device.type == "cuda" else None)
    result: dict[str, Any] = {
        "benchmark": "memory",
        "options": {k: v for k, v in asdict(options).items() if k != "output"},
        "environment": environment(device.type),
    }
    if model is None:
        return run_grid(result, options)
    result |= {"model": model, "rows": []}
    rows = at_shape_of(
        model, options, device, lambda rows: keep(result | {"rows": rows}, options.output)
    )
    finish(result | {"rows": rows}, options.output)
    return int(failed(rows))


if __name__ == "__main__":
    gc.freeze()  # what the libraries have made is not to be walked after every row
    sys.exit(main(tyro.cli(MemoryBenchmark, description=__doc__)))
