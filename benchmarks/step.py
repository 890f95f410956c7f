"""How long one optimizer step takes beside PEFT's (Q)LoRA and pyreft's LoReFT.

Run ``python -m benchmarks.step``. A randomly initialised Llama (d = 1024, 16 layers, 246 M
parameters), one batch of 4 x (192 prompt + 64 response) tokens; forward, backward, AdamW step,
zero_grad; no activation checkpointing. Goals: LoReFT on every layer with f7+l7 is faster than PEFT
QLoRA r16 on all linear layers (NF4 base) and than pyreft's LoReFT (fp32 base).

What keeps it fair: all methods read the same weights and the same batch and share the timed code;
``base_loss`` and ``base_forward_s`` show that they start from the same work; LoRA runs on the base
that LoReFT runs on, with PEFT's defaults (no dropout, no fp32 upcasts); pyreft shares its weights
over positions, its cheaper form. "our head" rows compute logits for supervised tokens only, as
``lowmem_reft.runs.train`` does for every method (``lowmem_reft.base.loss``); the others form the
full logits, as PEFT and pyreft do (``logits_shape`` in the JSON).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.common import Worker, alternate, environment, pyreft_python, ratio, report
from benchmarks.training_step import BATCH_FILE, StepSpec
from lowmem_reft.options import Storage

QLORA, LOREFT_NF4 = "QLoRA r16, NF4", "LoReFT r4, NF4"
QLORA_SHORT, LOREFT_NF4_SHORT = "QLoRA r16, NF4, our head", "LoReFT r4, NF4, our head"
LORA, LOREFT_FP32, PYREFT = "LoRA r16, fp32", "LoReFT r4, fp32", "pyreft LoReFT r4, fp32"
LOREFT_FP32_SHORT = "LoReFT r4, fp32, our head"
GOAL = 1.0
BASE_LOSS_TOLERANCE = 1e-3
"""Largest difference between the losses of one base in two environments, in nats."""

COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "median s": lambda row: f"{row['median_s']:.3f}",
    "min s": lambda row: f"{row['min_s']:.3f}",
    "max s": lambda row: f"{row['max_s']:.3f}",
    "base forward s": lambda row: f"{row['base_forward_s']:.3f}",
    "trained": lambda row: f"{row['num_trainable_params']:,}",
    "peak MiB": lambda row: _mebibytes(row["peak_allocated_bytes"] or row["peak_rss_bytes"]),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama and its batch."""

    hidden_size: int = 1024
    """Width."""
    num_layers: int = 16
    """Blocks."""
    intermediate_size: int = 2816
    """Width of the MLP."""
    num_heads: int = 16
    """Query heads."""
    num_kv_heads: int = 4
    """Key and value heads."""
    vocab_size: int = 32000
    """Tokens."""
    prompt: int = 192
    """Prompt tokens per example."""
    response: int = 64
    """Supervised tokens per example."""
    batch_size: int = 4
    """Examples."""


SMALL = Shape(
    hidden_size=64,
    num_layers=2,
    intermediate_size=192,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=512,
    prompt=24,
    response=8,
    batch_size=2,
)


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Time one optimizer step of LoReFT, QLoRA, LoRA and pyreft."""

    pyreft_python: str | None = None
    """Interpreter of an environment with pyreft (default: $LOWMEM_REFT_PYREFT_PYTHON); without one
    it is left out."""
    compute_dtype: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the NF4 base, for QLoRA and LoReFT alike."""
    device: str = "cpu"
    """cpu or cuda; peak memory is resident memory on the CPU and allocated memory on CUDA."""
    threads: int = 2
    """Threads of every process."""
    repeats: int = 3
    """Timed rounds after one that is not counted."""
    small: bool = False
    """A tiny shape that only shows that the benchmark works."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/*.json)."""


def write_inputs(shape: Shape, directory: Path) -> int:
    """Write a seeded random fp32 Llama and one batch; return the number of parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        vocab_size=shape.vocab_size,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(directory)
    input_ids = torch.randint(
        3, shape.vocab_size, (shape.batch_size, shape.prompt + shape.response)
    )
    labels = input_ids.clone()
    labels[:, : shape.prompt] = -100
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    save_file(batch, directory / BATCH_FILE)
    return sum(p.numel() for p in model.parameters())


def make_workers(options: StepOptions, directory: Path) -> list[Worker]:
    """One worker per method; pyreft only where it is installed."""

    def worker(label: str, method: str, storage: Storage, python: str | None = None) -> Worker:
        spec = StepSpec(
            directory=str(directory),
            method=method,
            storage=storage,
            compute_dtype=options.compute_dtype if storage == "nf4" else "fp32",
            rank=16 if method == "lora" else 4,
            device=options.device,
            supervised_head=label.endswith("our head"),
        )
        return Worker(
            label=label,
            module="benchmarks.pyreft_worker" if python else "benchmarks.worker",
            spec={"kind": "step", **asdict(spec)},
            python=python or sys.executable,
            threads=options.threads,
        )

    workers = [
        worker(QLORA, "lora", "nf4"),
        worker(LOREFT_NF4, "loreft", "nf4"),
        worker(QLORA_SHORT, "lora", "nf4"),
        worker(LOREFT_NF4_SHORT, "loreft", "nf4"),
        worker(LORA, "lora", "fp32"),
        worker(LOREFT_FP32, "loreft", "fp32"),
        worker(LOREFT_FP32_SHORT, "loreft", "fp32"),
    ]
    peer_python = pyreft_python(options.pyreft_python)
    if peer_python:
        workers.append(worker(PYREFT, "loreft", "fp32", peer_python))
    return workers


def run(options: StepOptions) -> dict[str, Any]:
    """Measure all methods and return the result."""
    record = environment(options.device, pyreft_python(options.pyreft_python))
    shape = SMALL if options.small else Shape()
    with tempfile.TemporaryDirectory() as directory:
        num_params = write_inputs(shape, Path(directory))
        rows = alternate(
            make_workers(options, Path(directory)), num_warmup=1, num_repeats=options.repeats
        )
    for pair in (
        (QLORA, LOREFT_NF4, QLORA_SHORT, LOREFT_NF4_SHORT),
        (LORA, LOREFT_FP32, LOREFT_FP32_SHORT, PYREFT),
    ):
        check_comparable([row for row in rows if row["method"] in pair])
    return {
        "benchmark": "step",
        "shape": asdict(shape),
        "num_base_params": num_params,
        "compute_dtype": options.compute_dtype,
        "device": options.device,
        "rows": rows,
        "ratios": [
            ratio(rows, LOREFT_NF4, QLORA, GOAL),
            ratio(rows, LOREFT_FP32, LORA, GOAL),
            ratio(rows, LOREFT_FP32, PYREFT, GOAL),
            ratio(rows, LOREFT_NF4_SHORT, QLORA_SHORT, GOAL),
            ratio(rows, LOREFT_FP32_SHORT, PYREFT, GOAL),
        ],
        "environment": record,
    }


def check_comparable(rows: list[dict[str, Any]]) -> None:
    """Refuse to compare methods that start from different bases, or one that changes nothing.

    Raises:
        RuntimeError: the losses of the untouched bases differ, or training left one as it was.
    """
    losses = {row["method"]: row["base_loss"] for row in rows if "base_loss" in row}
    if losses and max(losses.values()) - min(losses.values()) > BASE_LOSS_TOLERANCE:
        raise RuntimeError(f"the methods did not start from the same base: {losses}")
    for row in rows:
        if "loss" in row and row["loss"] == row["base_loss"]:
            raise RuntimeError(f"{row['method']} has no effect: its loss is still {row['loss']}")


def _mebibytes(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 2**20:.0f}"


def main() -> None:
    """Run the benchmark from the command line; the exit code is 1 if a row failed."""
    options = tyro.cli(StepOptions, prog="python -m benchmarks.step")
    result = run(options)
    report(
        result,
        title="one optimizer step: (Q)LoRA on all linear layers, LoReFT on all layers at f7+l7",
        columns=COLUMNS,
        json_only=options.json,
        output=options.output,
    )
    sys.exit(any("error" in row for row in result["rows"]))


if __name__ == "__main__":
    main()
