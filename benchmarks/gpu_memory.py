"""Memory and speed on a CUDA card at the shapes of real models, predicted beside measured.

Run ``python -m benchmarks.gpu_memory --model llama-3.1-8b`` (also qwen3-14b, llama-3.3-70b).
Weights are random and drawn as they are stored, so no checkpoint is needed and nothing is ever
there in full precision. Methods: LoReFT in three settings, PEFT QLoRA, and LoRA on a 16-bit base,
at 512, 2,048 and 8,192 tokens; a row that runs out of memory is a row. ``--seconds`` bounds the
whole command.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.common import environment, finish
from lowmem_reft.errors import InputError
from lowmem_reft.memory.measure import measure
from lowmem_reft.memory.planner import Planner, read_config
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.memory.profile import build_model
from lowmem_reft.memory.step import make_batch, training_step, warm_up
from lowmem_reft.options import MemoryOptions, MethodOptions

CHECKPOINTED = MemoryOptions(activation_checkpointing=True)
FRUGAL = MemoryOptions(
    activation_checkpointing=True,
    offload_activations=True,
    mlp_tokens=4096,
    embedding_on_host=True,
)
LOREFT = MethodOptions(method="loreft", rank=4, positions="f7+l7")
UPPER = MethodOptions(method="loreft", rank=4, positions="l1", layers="upper:0.5")
QLORA, LORA = MethodOptions(method="qlora", rank=16), MethodOptions(method="lora", rank=16)
SETTINGS = {
    "LoReFT f7+l7": Setting(method=LOREFT, memory=CHECKPOINTED),
    "LoReFT f7+l7, every way to save": Setting(method=LOREFT, memory=FRUGAL),
    "LoReFT upper half l1": Setting(method=UPPER, memory=CHECKPOINTED),
    "PEFT QLoRA r16": Setting(method=QLORA, memory=CHECKPOINTED, chunked_loss=False),
    "QLoRA r16, our loss": Setting(method=QLORA, memory=CHECKPOINTED),
    "PEFT LoRA r16, bf16 base": Setting(
        storage="bf16", method=LORA, memory=CHECKPOINTED, chunked_loss=False
    ),
}


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Measure one model's shape."""

    model: str = "llama-3.1-8b"
    """Short name, hub id, directory or config.json; only its shape is used."""
    tokens: str = "512,2048,8192"
    """Comma-separated lengths of the one example of a batch."""
    methods: str | None = None
    """Only methods whose label contains this."""
    repeats: int = 3
    """Timed steps after two that are not counted."""
    seconds: float = 480
    """Rows that would start later than this are left out, and named."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/gpu_memory-MODEL.json)."""


def row(config: Any, setting: Setting, model: Any, seq_len: int, repeats: int) -> dict[str, Any]:
    """Predict and measure one length on a built model."""
    device = torch.device("cuda", torch.cuda.current_device())
    lengths = Lengths(seq_len=seq_len, response_len=seq_len // 4, padded=False)
    planner = Planner(config)
    predicted = planner.training_peak_bytes(setting, lengths)
    batch = make_batch(1, seq_len, seq_len // 4, padded=False, vocab_size=config.vocab_size)
    batch = {key: value.to(device) for key, value in batch.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()
    warm_up(model, optimizer)
    training_step(model, batch, optimizer)
    measured = measure(device, lambda: training_step(model, batch, optimizer))
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        training_step(model, batch, optimizer)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return {
        "predicted_bytes": predicted,
        "measured_bytes": measured.allocated_bytes,
        "reserved_bytes": measured.reserved_bytes,
        "ratio": predicted / measured.allocated_bytes,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "tokens_per_s": seq_len / statistics.median(seconds),
    }


def rows_of(options: GpuMemory, config: Any, started: float) -> list[dict[str, Any]]:
    """Measure every method at every length; out of memory is a row."""
    device = torch.device("cuda", torch.cuda.current_device())
    rows: list[dict[str, Any]] = []
    for label, setting in SETTINGS.items():
        if options.methods is not None and options.methods not in label:
            continue
        model = None
        for tokens in options.tokens.split(","):
            facts: dict[str, Any] = {"method": label, "tokens": int(tokens)}
            if time.perf_counter() - started > options.seconds:
                rows.append({**facts, "error": f"left out after {options.seconds:g} s"})
                continue
            try:
                if model is None:
                    model = build_model(config, setting, device, random_weights=True)
                facts |= row(config, setting, model, int(tokens), options.repeats)
            except torch.OutOfMemoryError as error:
                facts["error"] = f"out of memory: {str(error).splitlines()[0]}"
            except InputError as error:  # such as a tied embedding that cannot leave the card
                facts["error"] = str(error)
            rows.append(facts)
            _say(facts)
            gc.collect()
            torch.cuda.empty_cache()
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _say(facts: dict[str, Any]) -> None:
    if "error" in facts:
        line = facts["error"]
    else:
        line = (
            f"predicted {facts['predicted_bytes'] / 2**30:7.3f} GiB, measured "
            f"{facts['measured_bytes'] / 2**30:7.3f} (ratio {facts['ratio']:.4f}), reserved "
            f"{facts['reserved_bytes'] / 2**30:7.3f}, {facts['tokens_per_s']:8.0f} tokens/s"
        )
    print(f"{facts['method']:34} {facts['tokens']:6} {line}", file=sys.stderr, flush=True)


def main(options: GpuMemory) -> int:
    """Print the rows and one JSON line; 2 without a CUDA device."""
    if not torch.cuda.is_available():
        print("benchmarks.gpu_memory: a CUDA device is needed, found none", file=sys.stderr)
        return 2
    started = time.perf_counter()
    config = read_config(options.model)
    facts = environment("cuda")
    result = {
        "benchmark": "gpu_memory",
        "options": {k: v for k, v in asdict(options).items() if k != "output"},
        "environment": facts,
        "model": options.model,
        "rows": rows_of(options, config, started),
    }
    finish(result, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(GpuMemory, description=__doc__)))
