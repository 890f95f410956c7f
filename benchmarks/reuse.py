"""Training from stored constants beside the plain step and PEFT's QLoRA.

Run ``python -m benchmarks.reuse``. A randomly initialised NF4 Llama (d = 1024, 16 layers, 246 M
parameters); every method trains on the same examples with AdamW; one warm-up step, then rounds in
which every method takes one step, forwards and backwards in turn. All methods compute the loss with
``lowmem_reft.loss`` except "PEFT QLoRA", which forms all logits, as PEFT does.

Shapes: batch 4 x (192 prompt + 64 response), LoReFT r4 at layer 8, ``l1``; the upper half with
``all``; batch 1 x (960 + 64) at layer 12, ``l1``. The arithmetic ratio beside each counts blocks
times tokens: a QLoRA step is one forward and one backward pass of all blocks, with checkpointing
one more forward.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig

from benchmarks.common import environment
from lowmem_reft import ReftConfig
from lowmem_reft.checkpointing import enable_activation_checkpointing
from lowmem_reft.frozen.proof import prove
from lowmem_reft.frozen.reuse import Reuse
from lowmem_reft.loss import use_chunked_loss
from lowmem_reft.synthetic import base_with_random_weights

QLORA, QLORA_OURS = "PEFT QLoRA r16", "QLoRA r16, our loss"
QLORA_CHECKPOINTED = "PEFT QLoRA r16, checkpointing"
PLAIN, REUSED = "LoReFT, plain", "LoReFT, reused"


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
    positions: str
    """Tokens that it edits."""
    lowest: int
    """The lowest edited block."""


SHAPES = (
    Shape(
        name="layer 8, l1",
        prompt=192,
        response=64,
        batch_size=4,
        layers="8",
        positions="l1",
        lowest=8,
    ),
    Shape(
        name="upper half, all",
        prompt=192,
        response=64,
        batch_size=4,
        layers="upper:0.5",
        positions="all",
        lowest=8,
    ),
    Shape(
        name="long prompt, layer 12, l1",
        prompt=960,
        response=64,
        batch_size=1,
        layers="12",
        positions="l1",
        lowest=12,
    ),
)


@dataclass(frozen=True, kw_only=True)
class ReuseBenchmark:
    """Time the reused step."""

    repeats: int = 3
    """Timed rounds after one that is not counted."""
    batches: int = 2
    """Batches of examples in the data set."""
    threads: int = 2
    """Threads."""
    small: bool = False
    """A tiny shape that only shows that the benchmark works."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too (benchmarks/results/reuse.json)."""


def config_of(*, small: bool) -> Any:
    """Return the shape of the base."""
    width, layers, vocab = (64, 16, 512) if small else (1024, 16, 32000)
    return AutoConfig.for_model(
        "llama",
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=width * 11 // 4,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=vocab,
    )


def make_examples(shape: Shape, vocab: int, count: int) -> list[dict[str, Any]]:
    """Return random examples of one length."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(count):
        ids = torch.randint(
            3, vocab, (shape.prompt + shape.response,), generator=generator
        ).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * shape.prompt + ids[shape.prompt :]})
    return examples


def stacked(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch."""
    ids = torch.tensor([example["input_ids"] for example in examples])
    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted(config: Any, peft_config: Any, *, our_loss: bool, checkpointing: bool = False) -> Any:
    """Return the same random base with an adapter."""
    base: Any = base_with_random_weights(
        config, device=torch.device("cpu"), storage="nf4", compute_dtype=torch.float32
    )
    torch.manual_seed(0)
    model: Any = get_peft_model(base, peft_config)
    if checkpointing:
        enable_activation_checkpointing(model)
    if our_loss:
        use_chunked_loss(model)
    return model.train()


def stepper(model: Any, loss: Callable[[int], torch.Tensor]) -> Callable[[int], float]:
    """Return what takes one optimizer step on a batch and says how long it took."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(batch: int) -> float:
        started = time.perf_counter()
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    return step


def compare(shape: Shape, options: ReuseBenchmark, directory: Path) -> dict[str, Any]:
    """Measure every method on one shape."""
    config = config_of(small=options.small)
    examples = make_examples(shape, config.vocab_size, shape.batch_size * options.batches)
    size = shape.batch_size
    parts = [examples[start : start + size] for start in range(0, len(examples), size)]
    batches = [stacked(part) for part in parts]
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    reft = ReftConfig(
        task_type="CAUSAL_LM", rank=4, layers=shape.layers, positions=shape.positions, init="paper"
    )
    steps: dict[str, Callable[[int], float]] = {}
    for name, peft_config, our_loss, checkpointing in (
        (QLORA, lora, False, False),
        (QLORA_OURS, lora, True, False),
        (QLORA_CHECKPOINTED, lora, False, True),
        (PLAIN, reft, True, False),
        (REUSED, reft, True, False),
    ):
        model = adapted(config, peft_config, our_loss=our_loss, checkpointing=checkpointing)
        if name == REUSED:
            reuse = Reuse(model, examples, directory)
            error = max(
                prove(reuse, list(range(i * size, (i + 1) * size)), batch)
                for i, batch in enumerate(batches)
            )
            steps[name] = stepper(
                model,
                lambda i, reuse=reuse: reuse.loss(list(range(i * size, (i + 1) * size))),
            )
        else:
            steps[name] = stepper(model, lambda i, model=model: model(**batches[i])["loss"])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.repeats + 1):
        names = list(steps) if number % 2 else list(reversed(steps))
        for name in names:
            taken = steps[name](number % len(batches))
            if number:
                seconds[name].append(taken)
    rows = {
        name: {"median_s": statistics.median(v), "min_s": min(v), "max_s": max(v)}
        for name, v in seconds.items()
    }
    layers, tokens = config.num_hidden_layers, shape.prompt + shape.response
    upper = layers - shape.lowest - 1
    kept = shape.response + 1 if shape.positions == "l1" else tokens
    for name, row in rows.items():
        _say(f"{shape.name:26} {name:30} {row['median_s']:8.3f} s")
    return {
        "shape": asdict(shape),
        "rows": rows,
        "mode": reuse.mode,
        "store_bytes": reuse.layout.total_bytes,
        "build_time_s": reuse.build_time_s,
        "num_batches": len(batches),
        "max_grad_rel_error": error,
        "arithmetic_ratio": layers * tokens / (upper * kept),
    }


def ratio(result: dict[str, Any], slower: str, faster: str = REUSED) -> float:
    """Return the ratio of two medians."""
    rows = result["rows"]
    return float(rows[slower]["median_s"] / rows[faster]["median_s"])


def ratios_of(results: list[dict[str, Any]]) -> dict[str, float]:
    """Return the contract's ratios."""
    first, upper, long = results
    epochs = 6
    plain = first["rows"][QLORA]["median_s"] * first["num_batches"] * epochs
    reused = first["rows"][REUSED]["median_s"] * first["num_batches"] * epochs
    return {
        "reuse_vs_qlora": ratio(first, QLORA),
        "reuse_vs_qlora_our_loss": ratio(first, QLORA_OURS),
        "reuse_vs_qlora_checkpointing": ratio(first, QLORA_CHECKPOINTED),
        "reuse_vs_plain_loreft": ratio(first, PLAIN),
        "six_epochs_vs_qlora": plain / (reused + first["build_time_s"]),
        "upper_all_vs_qlora_checkpointing": ratio(upper, QLORA_CHECKPOINTED),
        "long_prompt_vs_qlora": ratio(long, QLORA),
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(options: ReuseBenchmark) -> int:
    """Print the times and one JSON line."""
    # Small operators on two threads take turns waiting when anything else runs.
    torch.set_num_threads(1 if options.small else options.threads)
    facts = environment("cpu")
    directory = Path(tempfile.mkdtemp(prefix="lowmem-reft-reuse-"))
    try:
        results = [compare(shape, options, directory) for shape in SHAPES]
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    result = {
        "benchmark": "reuse",
        "options": {k: v for k, v in asdict(options).items() if k != "output"},
        "environment": facts,
        "ratios": ratios_of(results),
        "max_grad_rel_error": max(item["max_grad_rel_error"] for item in results),
        "results": results,
    }
    for name, value in result["ratios"].items():
        _say(f"{name:36} {value:6.2f}")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(ReuseBenchmark, description=__doc__)))
