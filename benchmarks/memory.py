"""Predicted against measured peak memory, and where the bytes of a step are.

Run ``python -m benchmarks.memory``. On the CPU the measure is independent of any count of ours: the
allocator's own events, recorded by torch.profiler, on top of the tensors that were there before.
The grid is 3 architectures x storage x method x checkpointing x lengths and batch sizes. The
second part is one shape, batch 4 x (192 prompt + 64 response), vocabulary 32,000, d = 1024, 16
layers: peak over weights of LoReFT and QLoRA with their own loss and with ours.

Goals: never under, at most 3 % over; LoReFT with checkpointing at most 180 MiB over the weights in
fp32, at most 100 MiB in bf16.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from transformers import AutoConfig

from benchmarks.common import environment
from lowmem_reft.memory.live import LiveMemory, label_model
from lowmem_reft.memory.planner import Planner
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.memory.profile import build_model, measure_step
from lowmem_reft.memory.step import make_batch, training_step, warm_up
from lowmem_reft.options import MemoryOptions, MethodOptions

LOREFT = MethodOptions(method="loreft", rank=4, positions="f7+l7")
LOREFT_ALL = MethodOptions(method="loreft", rank=4, positions="all")
LOREFT_UPPER = MethodOptions(method="loreft", rank=4, positions="l1", layers="upper:0.5")
QLORA = MethodOptions(method="qlora", rank=16)
METHODS = {
    "LoReFT f7+l7": LOREFT,
    "LoReFT all": LOREFT_ALL,
    "LoReFT upper half l1": LOREFT_UPPER,
    "QLoRA r16": QLORA,
}
PLAIN, CHECKPOINTED = MemoryOptions(), MemoryOptions(activation_checkpointing=True)
CHUNKED = MemoryOptions(activation_checkpointing=True, mlp_tokens=256)
BATCHES = ((1, 512, False), (4, 128, True))
"""Batch size, tokens, and whether an example is shorter than the others."""


@dataclass(frozen=True, kw_only=True)
class MemoryBenchmark:
    """Measure predicted and real peaks."""

    small: bool = False
    """A quarter of the grid on small shapes, and no second part."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/memory.json)."""


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


def measured_peak(config: Any, setting: Setting, batch: dict[str, Any]) -> tuple[int, int]:
    """Return the measured peak and the bytes of the base (weights and constants)."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = build_model(config, setting, device, random_weights=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    warm_up(model, optimizer)
    held = LiveMemory("cpu")
    label_model(held, model)
    base_bytes = held.by_category["weights"] + held.by_category["quantization_constants"]
    step = partial(training_step, model, batch, optimizer)
    step()
    measured, held_bytes = measure_step(device, model, optimizer, batch, step)
    return measured.allocated_bytes + held_bytes, base_bytes


def cell(
    config: Any, setting: Setting, size: tuple[int, int, bool], response_len: int
) -> dict[str, Any]:
    """Predict and measure one setting."""
    batch_size, seq_len, padded = size
    lengths = Lengths(
        seq_len=seq_len, batch_size=batch_size, padded=padded, response_len=response_len
    )
    planner = Planner(config)
    predicted = planner.training_peak_bytes(setting, lengths)
    peak = planner.predictor(setting).training(lengths).peak
    batch = make_batch(
        batch_size, seq_len, response_len, padded=padded, vocab_size=config.vocab_size
    )
    measured, base_bytes = measured_peak(config, setting, batch)
    gc.collect()
    return {
        "predicted_bytes": predicted,
        "measured_bytes": measured,
        "ratio": predicted / measured,
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
        _say(
            f"{architecture:7} {storage:5} {dtype:5} {method:21} "
            f"{'checkpointed' if memory.activation_checkpointing else 'plain':13} {size!s:15} "
            f"{row['predicted_bytes'] / 2**20:9.2f} {row['measured_bytes'] / 2**20:9.2f} MiB "
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
        _say(
            f"{label:36} measured {row['over_weights_bytes'] / 2**20:7.1f} MiB over weights, "
            f"predicted/measured {row['ratio']:.4f}  {row['place']}"
        )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> Path:
    """Scatter predicted over measured against measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for marker, method in zip("osD^", METHODS, strict=True):
        chosen = [row for row in rows if row["method"] == method]
        axes.scatter(
            [row["measured_bytes"] / 2**20 for row in chosen],
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(options: MemoryBenchmark) -> dict[str, Any]:
    """Run the benchmark and return its result."""
    rows = accuracy(options)
    ratios = [row["ratio"] for row in rows]
    result: dict[str, Any] = {
        "benchmark": "memory",
        "options": {k: v for k, v in asdict(options).items() if k != "output"},
        "environment": environment("cpu"),
        "num_settings": len(rows),
        "smallest_ratio": min(ratios),
        "largest_ratio": max(ratios),
        "num_under": sum(ratio < 1 for ratio in ratios),
        "rows": rows,
    }
    if not options.small:
        result["floor"] = floor()
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        draw(rows, options.output.with_suffix(".png"))
    return result


def main(options: MemoryBenchmark) -> int:
    """Print the summary and one JSON line; 1 if a prediction is under or far over."""
    result = run(options)
    _say(
        f"{result['num_settings']} settings: predicted / measured from "
        f"{result['smallest_ratio']:.4f} to {result['largest_ratio']:.4f}"
    )
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    return int(result["num_under"] > 0 or result["largest_ratio"] > 1.03)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(MemoryBenchmark, description=__doc__)))
