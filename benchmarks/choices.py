"""What it costs to score choices that share their prompt, beside whole sequences.

Run ``python -m benchmarks.choices --model SmolLM2-135M-Instruct --data-dir DIR``. Rows of public
tasks are scored by the likelihood of their choices, bare or with a LoReFT r4 ``l1+response``
adapter that starts at random: once as ``evaluate`` does, and once each prompt with each choice. The
rows say the processor seconds of each way (``cpu_s``: a busy machine adds little to them) and, of
the first, how far its log-likelihoods are from the other's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from peft import get_peft_model
from transformers import AutoTokenizer

from benchmarks.common import environment, report
from lowmem_reft import ReftConfig, load_base
from lowmem_reft.data.tasks.registry import load_task
from lowmem_reft.data.tokens import encode_all_choices
from lowmem_reft.methods.choices import choices_log_likelihood
from lowmem_reft.methods.likelihood import each_log_likelihood

COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "CPU s": lambda row: f"{row['cpu_s']:.1f}",
    "of whole sequences": lambda row: f"{row['share']:.2f}",
    "largest difference": lambda row: f"{row['difference']:.1e}",
    "choices that change": lambda row: str(row["num_changed"]),
}


@dataclass(frozen=True, kw_only=True)
class ChoicesBenchmark:
    """Score choices with their prompt in common, and in whole sequences."""

    model: str
    """Directory or hub id of a base."""
    data_dir: Path | None = None
    """Directory with the public files; default: the hub."""
    tasks: str = "trec,arc-easy"
    """Public tasks, their training files."""
    storage: Literal["nf4", "fp32"] = "nf4"
    """How the base is stored; it computes in fp32."""
    adapted: bool = False
    """With the adapter."""
    rows: int = 100
    """Rows of each task."""
    batch_size: int = 16
    """Sequences per forward pass."""
    json: bool = False
    """Keep standard output to the JSON line."""
    output: Path | None = None
    """Write the result here too."""


def run(options: ChoicesBenchmark) -> dict[str, Any]:
    """Score each task both ways and return the result."""
    record = environment()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = load_base(options.model, storage=options.storage, compute_dtype="fp32")
    if options.adapted:
        config = ReftConfig(
            task_type="CAUSAL_LM", rank=4, positions="l1+response", init="paper", layers="all"
        )
        model = get_peft_model(model, config)
    model.eval()
    rows: list[dict[str, Any]] = []
    for task in options.tasks.split(","):
        read = load_task(task, "train", data_dir=options.data_dir, limit=options.rows)
        examples = [row.examples for row in encode_all_choices(read, tokenizer)]
        rows += _both_ways(model, tokenizer, task, examples, options.batch_size)
    return {"benchmark": "choices", "rows": rows, "ratios": [], "environment": record}


def _both_ways(
    model: Any, tokenizer: Any, task: str, examples: list[list[Any]], size: int
) -> list[dict[str, Any]]:
    choices_log_likelihood(model, examples[:2], tokenizer, batch_size=size)  # warm-up
    start = time.process_time()
    shared = choices_log_likelihood(model, examples, tokenizer, batch_size=size)
    between = time.process_time()
    flat = [example for row in examples for example in row]
    rest = iter(each_log_likelihood(model, flat, tokenizer, batch_size=size))
    end = time.process_time()
    whole = [[next(rest) for _ in row] for row in examples]
    pairs = list(zip(shared, whole, strict=True))
    gaps = [abs(a - b) for one, two in pairs for (a, _), (b, _) in zip(one, two, strict=True)]
    figures: dict[str, Any] = {
        "difference": max(gaps),
        "num_changed": sum(one.index(max(one)) != two.index(max(two)) for one, two in pairs),
    }
    seconds, seconds_whole = between - start, end - between
    nothing = dict.fromkeys(figures, 0)
    return [
        {"method": f"{task}, {way}", "cpu_s": cpu_s, "share": cpu_s / seconds_whole, **more}
        for way, cpu_s, more in (
            ("shared", seconds, figures),
            ("whole", seconds_whole, nothing),
        )
    ]


def main() -> None:
    """Run the benchmark from the command line."""
    options = tyro.cli(ChoicesBenchmark, prog="python -m benchmarks.choices")
    report(
        run(options),
        title="scoring choices",
        columns=COLUMNS,
        json_only=options.json,
        output=options.output,
    )


if __name__ == "__main__":
    main()
