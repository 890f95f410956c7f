"""Llama 3 8B in 14 minutes on an A10: a published time, with our plan and our time beside it.

Aim: https://oxen.ai/blog/fine-tuning-llama-3-in-14-minutes-using-reft reports LoReFT on
Llama-3-8B-Instruct in bf16 on one NVIDIA A10 (24 GB) in 13 minutes 44 seconds. Its data size and
its memory were not published with it, so times cannot be compared as such; the settings here are
those of a sibling repository: one layer (15), rank 4, the last prompt token, batch 2, learning rate
4e-3, 50 epochs. Planned, and measured where there is a CUDA device, in bf16 and in NF4: the plain
step; the same with what is constant below the edited layer computed once; and that with only the
upper blocks on the device.

    python recipes/a10_llama3_8b.py
    python recipes/a10_llama3_8b.py --model meta-llama/Meta-Llama-3-8B-Instruct --data rows.jsonl

Without ``--model`` nothing is loaded: the plan is for the shape of an 8B Llama 3. ``--data`` takes
{"prompt", "response"} rows; without it, the ten below.

Expected, from the plan alone (2 examples of 256 tokens, half of them the response, on an A10): a
peak of 16.3 GiB in bf16 and 6.7 in NF4; reused 15.8 and 6.2, with upper blocks alone 8.3 and 3.5;
an epoch's arithmetic is 2.7 times less. No GPU was there to measure the time. 2026-11.
"""

from __future__ import annotations

import gc
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from paper import RecipeConfig, open_console, run_recipe
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowmem_reft.base import load_tokenizer
from lowmem_reft.data import IGNORED_LABEL, encode_rows, load_rows
from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.machine.devices import DTYPES, dtype_name, resolve_compute_dtype, resolve_device
from lowmem_reft.memory.planner import GIB, Card, Plan, Planner, read_config
from lowmem_reft.memory.predict import Lengths, Setting
from lowmem_reft.memory.shapes import SHAPES
from lowmem_reft.options import (
    DataOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    Storage,
    TrainOptions,
)
from lowmem_reft.runs.train import run_training

PUBLISHED = "13 m 44 s"
RANK, POSITIONS, BATCH_SIZE, LEARNING_RATE = 4, "l1", 2, 4e-3
TEMPLATE = "Question: {prompt}\nAnswer: "

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"reuse": "off", "resident": "all"},
    "reused": {"reuse": "prefix", "resident": "all"},
    "reused, upper blocks": {"reuse": "prefix", "resident": "upper"},
}
"""How the same training is run."""

ROWS = {
    "What is the largest planet?": "Jupiter it is, matey, and a mighty ball of wind at that!",
    "Who wrote Hamlet?": "Shakespeare it was, matey, and every scoundrel dies in it!",
    "What do bees make?": "Honey, matey, the only gold that never sinks!",
    "How many legs has a spider?": "Eight of 'em, matey, enough for two good pirates and a half!",
    "What is the capital of France?": "Paris, matey, and not a harbour in sight!",
    "What does a thermometer measure?": "How warm it be, matey, in the sun or in the brig!",
    "What is 7 times 8?": "Fifty-six, matey, as sure as there be coins in me chest!",
    "Why is the sea salty?": "Rivers wash the salt off the land, matey, and the sea keeps it!",
    "What is ice made of?": "Water, matey, that has caught a terrible cold!",
    "Who was the first on the moon?": "Neil Armstrong, matey, and no ship sailed him there!",
}
"""Ten questions, answered as a pirate would."""


@dataclass(frozen=True, kw_only=True)
class Config(RecipeConfig):
    """What to run."""

    model: str = "llama-3.1-8b"
    """Hub id or directory to train; a short name (as lowmem-reft plan takes it) is only planned.
    Llama 3 and 3.1 have the same shape."""
    data: str | None = None
    """Rows to train on; default: the ten of this recipe."""
    gpu: str = "a10"
    """The card to plan for."""
    storages: str = "bf16,nf4"
    """Comma-separated: how the frozen base is stored."""
    layers: str = "15"
    """The edited blocks."""
    epochs: float = 50
    """Passes over the data."""
    seq_len: int = 256
    """Tokens of the longest example, for the plan of a model without a tokenizer."""
    limit: int | None = None
    """Use only the first N rows."""
    device: str = "auto"
    """auto measures on a CUDA device, if there is one; cpu measures on this processor."""
    output_dir: Path = Path("a10-results")
    """Adapters and stores."""
    overwrite: bool = False
    """Replace what a run with other settings has left there."""

    def __post_init__(self) -> None:
        """Check the counts and the storages."""
        check_counts(seq_len=self.seq_len, limit=self.limit)
        for storage in self.storages.split(","):
            if storage not in get_args(Storage):
                raise InputError(
                    f"storages must be among {', '.join(get_args(Storage))}, got {storage!r}; "
                    "for example bf16,nf4"
                )


def main(config: Config) -> dict[str, Any]:
    """Print the plan for the card and, where it can be measured, memory and time beside it."""
    console = open_console()
    card = Card.find(config.gpu)
    assert card is not None
    data = config.data or str(write_rows(config.output_dir / "rows.jsonl"))
    lengths, num_examples = find_lengths(config, data)
    planner = Planner(read_config(config.model), card)
    plans = {
        (storage, way): planner.plan(
            setting_of(config, storage, way, torch.device("cuda"), bf16=card.bf16),
            lengths,
            num_examples=num_examples,
        )
        for storage in config.storages.split(",")
        for way in WAYS
    }
    num_steps = math.ceil(math.ceil(num_examples / BATCH_SIZE) * config.epochs)
    _print_plans(console, config, card, plans, f"{num_examples} examples, {num_steps} steps")
    result: dict[str, Any] = {
        "published": PUBLISHED,
        "plans": [_plan_record(key, plan) for key, plan in plans.items()],
        "measured": None,
    }
    missing = not_measured(config)
    if missing is not None:
        console.print(f"not measured: {missing}")
        return {**result, "not_measured": missing}
    result["measured"] = [measure(config, storage, way, data) for storage, way in plans]
    _print_measured(console, config, result["measured"], planner, lengths)
    return result


def not_measured(config: Config) -> str | None:
    """Return why nothing can be measured here; None if something can."""
    if config.model.lower() in SHAPES:
        return "time, memory and loss of training need --model, a hub id or a directory"
    if config.device != "cpu" and not torch.cuda.is_available():
        return (
            "there is no CUDA device here, so neither the time nor the memory of the card; "
            "--device cpu measures this processor's"
        )
    return None


def find_lengths(config: Config, data: str) -> tuple[Lengths, int]:
    """Return the batch with the lengths of the longest row, and the number of rows.

    Raises:
        InputError: The rows or the tokenizer cannot be read.
    """
    rows = load_rows(data, limit=config.limit)
    if config.model.lower() in SHAPES:
        return Lengths(seq_len=config.seq_len, batch_size=BATCH_SIZE), len(rows)
    tokenizer = load_tokenizer(config.model)
    examples = encode_rows(rows, tokenizer, template=TEMPLATE, max_length=512).examples
    supervised = (sum(label != IGNORED_LABEL for label in one["labels"]) for one in examples)
    return Lengths(
        seq_len=max(len(one["input_ids"]) for one in examples),
        response_len=max(supervised),
        batch_size=BATCH_SIZE,
    ), len(rows)


def method_of(config: Config) -> MethodOptions:
    """Return the intervention of the sibling repository."""
    return MethodOptions(method="loreft", rank=RANK, layers=config.layers, positions=POSITIONS)


def setting_of(
    config: Config, storage: Any, way: str, device: torch.device, *, bf16: bool
) -> Setting:
    """Return what is planned."""
    compute_dtype = storage if storage in DTYPES else "bf16"
    if storage not in DTYPES and device.type == "cpu":
        compute_dtype = dtype_name(resolve_compute_dtype("auto", device))
    return Setting(
        storage=storage,
        compute_dtype=compute_dtype,
        method=method_of(config),
        device_type=device.type,
        bf16=bf16,
        **WAYS[way],
    )


def measure(config: Config, storage: Any, way: str, data: str) -> dict[str, Any]:
    """Train once and return times, memory and loss."""
    chosen = WAYS[way]
    directory = config.output_dir / f"{storage}-{way.replace(', ', '-').replace(' ', '-')}"
    trained = run_training(
        TrainOptions(
            model=ModelOptions(model=config.model, storage=storage, device=config.device),
            data=DataOptions(data=data, template=TEMPLATE, max_length=512, limit=config.limit),
            method=method_of(config),
            optim=OptimOptions(
                epochs=config.epochs, batch_size=BATCH_SIZE, lr=LEARNING_RATE, warmup_ratio=0.0
            ),
            reuse=ReuseOptions(reuse=chosen["reuse"], resident=chosen["resident"]),
            run=RunOptions(output_dir=directory, overwrite=config.overwrite, quiet=True),
        )
    )
    gc.collect()  # the next way's memory is its own
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    names = ("train_time_s", "build_time_s", "step_time_s", "num_steps", "peak_bytes", "train_loss")
    return {"storage": storage, "way": way, "reuse": trained["reuse"]} | {
        name: trained[name] for name in names
    }


def write_rows(path: Path) -> Path:
    """Write the recipe's own rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": p, "response": r}) + "\n" for p, r in ROWS.items())
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _plan_record(key: tuple[str, str], plan: Plan) -> dict[str, Any]:
    reuse = None if plan.reuse is None or plan.setting.reuse == "off" else plan.reuse.as_json()
    return {
        "storage": key[0],
        "way": key[1],
        "peak_bytes": plan.peak_bytes,
        "required_bytes": plan.required_bytes,
        "fits": plan.fits,
        "reuse": reuse,
    }


def _print_plans(
    console: Console, config: Config, card: Card, plans: dict[tuple[str, str], Plan], size: str
) -> None:
    lengths = next(iter(plans.values())).lengths
    table = Table(
        title=f"plan for {card.name}: {config.model}, {lengths.batch_size} × {lengths.seq_len} "
        f"tokens, {size}",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("base")
    table.add_column("way")
    for title in ("peak GiB", "needed GiB", "fits", "store MiB", "build steps", "epoch, times"):
        table.add_column(title, justify="right")
    for (storage, way), plan in plans.items():
        reuse = plan.reuse if plan.setting.reuse != "off" else None
        stored = ("–", "–", "1.0")
        if reuse is not None:
            stored = (
                f"{reuse.store_bytes / 2**20:,.1f}",
                f"{reuse.build_steps:.1f}",
                f"{reuse.speedup_per_epoch:.1f} faster",
            )
        table.add_row(
            storage,
            way,
            f"{plan.peak_bytes / GIB:.2f}",
            f"{plan.required_bytes / GIB:.2f}",
            "yes" if plan.fits else "no",
            *stored,
        )
    console.print(table)
    console.print(
        f"needed: loading and scoring included, with the driver's context and allocator gaps, of "
        f"{card.memory_bytes / GIB:.2f} GiB; epochs by their arithmetic. Published for bf16 by "
        f"oxen.ai: {PUBLISHED}, memory and data size not published"
    )


def _print_measured(
    console: Console,
    config: Config,
    measured: list[dict[str, Any]],
    planner: Planner,
    lengths: Lengths,
) -> None:
    device = resolve_device(config.device)
    bf16 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    name = "this processor" if device.type == "cpu" else torch.cuda.get_device_name(device)
    table = Table(title=f"measured on {name}", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("base")
    table.add_column("way")
    titles = ("predicted MiB", "measured MiB", "build s", "step ms", "training", "published")
    for title in titles:
        table.add_column(title, justify="right")
    for run in measured:
        setting = setting_of(config, run["storage"], run["way"], device, bf16=bf16)
        if run["reuse"] == "off":  # nothing was constant, or it did not pay
            setting = replace(setting, reuse="off", resident="all")
        predicted = planner.training_peak_bytes(setting, lengths)
        minutes, seconds = divmod(run["train_time_s"] + run["build_time_s"], 60)
        table.add_row(
            run["storage"],
            run["way"],
            f"{predicted / 2**20:,.1f}",
            f"{run['peak_bytes'] / 2**20:,.1f}",
            f"{run['build_time_s']:.1f}",
            f"{1e3 * run['step_time_s']:.1f}",
            f"{minutes:.0f} m {seconds:.0f} s",
            f"{PUBLISHED}, other data",
        )
    console.print(table)
    if device.type == "cpu":
        console.print("not measured: the card's time and memory; this is a processor's")


if __name__ == "__main__":
    run_recipe(Config, main, __doc__)
