r"""LoReFT against QLoRA on one card: what fits, what it costs, and which is better on your rows.

Aim: the question that the package is for, in one file. For a model and a card, every method is
planned on torch's meta device: the fastest split of the batch and the fewest ways to save memory
that fit. What cannot fit is refused before anything is loaded. What fits is trained and scored with
the same number of examples per optimizer step; the predicted peak stands beside the measured one.

    python recipes/loreft_vs_qlora_one_card.py --gpu 4090 --model Qwen/Qwen3-8B \
        --data train.jsonl --eval-data test.jsonl
    python recipes/loreft_vs_qlora_one_card.py --gpu 3060 --model llama-3.1-8b --plan-only
    python recipes/loreft_vs_qlora_one_card.py --memory-gib 0.013 --epochs 1 --seeds 0

Rows are those of ``lowmem-reft compare``; without ``--model`` and ``--data``, the tiny model and
the small task that the package ships. Where there is no CUDA device the plan is for this processor
and ``--gpu`` says how much memory there is; ``--plan-only`` plans for the card itself.

Expected of the last command (75 s of one CPU thread, 2026-11): LoReFT, 8
examples at a time, 11.7 MiB predicted and 11.6 measured, 80.8 %; QLoRA, 4 at a time, 12.5 and 12.1,
81.5 %. Of the second on an RTX 3060: LoReFT fits 2 examples of 512 tokens at a time, QLoRA one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from paper import RecipeConfig, decimals, open_console, percent, run_recipe, with_overrides
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowmem_reft.base import load_tokenizer
from lowmem_reft.compare import run_comparison
from lowmem_reft.data import IGNORED_LABEL, as_choices, encode_rows, label_names, load_rows
from lowmem_reft.data.embedded import model_dir, task_files
from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.machine.devices import DTYPES, dtype_name, resolve_compute_dtype, resolve_device
from lowmem_reft.memory.planner import GIB, Card, Planner, read_config
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.memory.search import Candidate, describe, fit, memory_ladder
from lowmem_reft.methods import MethodSpec, parse_methods
from lowmem_reft.options import (
    BaseOptions,
    CompareOptions,
    MatrixOptions,
    MemoryOptions,
    OptimOptions,
    RowsOptions,
    ScoredOptions,
    Storage,
)

METHODS = "loreft[rank=8],qlora[rank=16]"
TINY_METHODS = "loreft[rank=8,lr=4e-3],qlora[rank=8,lr=2e-3]"
"""The tiny model wants higher rates."""


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """What to run."""

    gpu: str | None = None
    """The card, by name (a10, 4090, 3060, t4, ...); or give --memory-gib."""
    memory_gib: float | None = None
    """Its memory instead."""
    model: str | None = None
    """Hub id or directory; with --plan-only also a short name such as llama-3.1-8b."""
    data: str | None = None
    """Training rows; a tenth is held out where there is no --eval-data."""
    eval_data: str | None = None
    """Rows to score."""
    methods: str | None = None
    """Default: LoReFT of rank 8 at f7+l7 and QLoRA of rank 16."""
    storage: Storage | None = None
    """How the frozen base is stored; default: nf4 for both."""
    batch_size: int = 16
    """Examples per optimizer step, the same for every method; the plan splits them."""
    max_length: int = 512
    """Tokens of prompt + response; --plan-only plans for examples of that length."""
    epochs: float = 3
    """Passes over the data."""
    seeds: str = "0,1,2"
    """Comma-separated."""
    limit: int | None = None
    """Use only the first N rows to train on and to score."""
    plan_only: bool = False
    """Only plan, for the card's CUDA kernels; nothing is loaded."""
    output_dir: Path = Path("one-card-results")
    """Cells, results and report; finished cells there are not run again."""

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(batch_size=self.batch_size, max_length=self.max_length, limit=self.limit)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A method on the card."""

    spec: MethodSpec
    """The method."""
    chosen: Candidate | None
    """How it is trained; None if it does not fit."""
    peak_bytes: int
    """Predicted peak of a training step; of the smallest possible one if it does not fit."""
    required_bytes: int
    """The same with the driver's context and the allocator's gaps."""


def main(config: Config) -> dict[str, Any]:
    """Plan, refuse what cannot fit, train and score the rest, and print both."""
    card = Card.find(config.gpu, config.memory_gib)
    if card is None:
        raise InputError("gpu must be given (or memory_gib), got neither; for example --gpu 3060")
    device = None if config.plan_only else resolve_device("auto")
    if device is not None and device.type == "cpu":
        card = replace(card, context_bytes=0)
    methods = config.methods or (TINY_METHODS if config.model is None else METHODS)
    specs = parse_methods(with_overrides(methods, storage=config.storage))
    planner = Planner(read_config(config.model or model_dir()), card)
    lengths = find_lengths(config)
    planned = [plan_method(planner, card, spec, lengths, device) for spec in specs]
    console = open_console()
    _print_plan(console, card, planned, lengths)
    plans = {plan.spec.label: _plan_record(plan) for plan in planned}
    fitting = [plan.spec.label for plan in planned if plan.chosen is not None]
    if not fitting:
        least = min(plan.required_bytes for plan in planned) / GIB
        raise InputError(
            f"memory_gib must be at least {least:.4g} for examples of {lengths.seq_len} tokens, "
            f"got {card.memory_bytes / GIB:.4g} ({card.name}); shorten the examples with "
            "--max-length, or choose a smaller model"
        )
    if config.plan_only:
        return {"plans": plans}
    result = run_comparison(_comparison(config, card, ",".join(fitting)))
    _print_measured(console, planned, {row["method"]: row for row in result["rows"]})
    return {"plans": plans, **result}


def find_lengths(config: Config) -> Lengths:
    """Return the batch with the lengths of the longest training row, or those asked for.

    Raises:
        InputError: The rows or the tokenizer cannot be read.
    """
    lengths = Lengths(seq_len=config.max_length, batch_size=config.batch_size)
    if config.plan_only:
        return lengths
    rows = load_rows(config.data or str(task_files()[0]), limit=config.limit)
    rows = as_choices(rows, label_names(rows) if rows[0].kind == "label" else None)
    tokenizer = load_tokenizer(config.model or str(model_dir()))
    template = "chat" if tokenizer.chat_template else "{prompt}"  # as the comparison asks them
    encoded = encode_rows(rows, tokenizer, template=template, max_length=config.max_length)
    examples = encoded.examples
    supervised = (
        sum(label != IGNORED_LABEL for label in example["labels"]) for example in examples
    )
    longest = max(len(example["input_ids"]) for example in examples)
    return replace(lengths, seq_len=longest, response_len=max(supervised))


def plan_method(
    planner: Planner, card: Card, spec: MethodSpec, lengths: Lengths, device: torch.device | None
) -> Planned:
    """Find the fastest way to train a method that fits, as ``train --memory-gib`` does.

    Args:
        planner: Of the model and the card.
        card: The memory to fit into.
        spec: The method.
        lengths: The batch as asked for.
        device: Where it will be trained; None plans for the card, which need not be here.
    """
    bf16 = card.bf16
    if device is not None:
        bf16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    compute_dtype = "bf16" if bf16 else "fp32"
    if spec.storage in DTYPES:
        compute_dtype = spec.storage
    elif device is not None:
        compute_dtype = dtype_name(resolve_compute_dtype("auto", device))
    setting = Setting(
        storage=spec.storage,
        compute_dtype=compute_dtype,
        method=spec.options,
        device_type="cuda" if device is None else device.type,
        bf16=bf16,
    )
    chosen = fit(planner, setting, lengths)
    if chosen is None:
        ladder = memory_ladder(planner.config, lengths.seq_len, setting)
        smallest = replace(lengths, batch_size=1, gradient_accumulation=2)
        peak = planner.training_peak_bytes(replace(setting, memory=ladder[-1]), smallest)
    else:
        peak = planner.training_peak_bytes(chosen.setting, chosen.lengths)
    return Planned(
        spec=spec, chosen=chosen, peak_bytes=peak, required_bytes=card.required_bytes(peak)
    )


def _comparison(config: Config, card: Card, methods: str) -> CompareOptions:
    return CompareOptions(
        base=BaseOptions(model=config.model),
        rows=RowsOptions(
            data=config.data,
            eval_data=config.eval_data,
            max_length=config.max_length,
            limit=config.limit,
        ),
        scored=ScoredOptions(eval_limit=config.limit),
        matrix=MatrixOptions(methods=methods, seeds=config.seeds),
        optim=OptimOptions(epochs=config.epochs, batch_size=config.batch_size),
        memory=MemoryOptions(memory_gib=card.memory_bytes / GIB),
        output_dir=config.output_dir,
    )


def _plan_record(plan: Planned) -> dict[str, Any]:
    flags = None if plan.chosen is None else describe(plan.chosen)
    return {
        "fits": plan.chosen is not None,
        "train_flags": flags,
        "peak_bytes": plan.peak_bytes,
        "required_bytes": plan.required_bytes,
    }


def _print_plan(console: Console, card: Card, planned: list[Planned], lengths: Lengths) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("method", "predicted peak GiB", "needed on the card GiB", "how"):
        table.add_column(title, justify="right" if "GiB" in title else "left", overflow="fold")
    for plan in planned:
        how = "refused: not even one example at a time with every way to save memory"
        table.add_row(
            plan.spec.label.replace("[", r"\["),
            f"{plan.peak_bytes / GIB:.3f}",
            f"{plan.required_bytes / GIB:.3f}",
            how if plan.chosen is None else describe(plan.chosen),
            style="red" if plan.chosen is None else None,
        )
    console.print(
        f"plan for {card.name} ({card.memory_bytes / GIB:.3g} GiB), {lengths.batch_size} examples "
        f"of up to {lengths.seq_len} tokens per optimizer step"
    )
    console.print(table)


def _print_measured(
    console: Console, planned: list[Planned], rows: Mapping[str, Mapping[str, Any]]
) -> None:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", overflow="fold")
    for title in ("trained", "predicted MiB", "measured MiB", "step ms", "accuracy %"):
        table.add_column(title, justify="right")
    for plan in planned:
        row = rows.get(plan.spec.label)
        if row is None:
            continue
        accuracy = decimals(percent(row))
        if row["value_sd"] is not None:
            accuracy += f" ± {100 * row['value_sd']:.1f}"
        table.add_row(
            plan.spec.label.replace("[", r"\["),
            "–" if row["num_trainable_params"] is None else f"{row['num_trainable_params']:,}",
            f"{plan.peak_bytes / 2**20:,.1f}",
            "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f}",
            decimals(None if row["step_time_s"] is None else 1e3 * row["step_time_s"]),
            accuracy if row["num_seeds"] else "failed",
        )
    console.print(table)
    if not torch.cuda.is_available():
        console.print("measured on a CPU: its peaks and times are not those of the card")


if __name__ == "__main__":
    run_recipe(Config, main, __doc__)
