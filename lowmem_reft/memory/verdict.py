"""``lowmem-reft plan``: does it fit, what would fit, and how long may the examples be?"""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from lowmem_reft.data.tokens import IGNORED_LABEL
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import DTYPES, dtype_name, resolve_compute_dtype, resolve_device
from lowmem_reft.machine.processes import shards_model
from lowmem_reft.machine.progress import counter
from lowmem_reft.memory.live import CATEGORIES
from lowmem_reft.memory.planner import (
    GIB,
    Candidate,
    Card,
    Lengths,
    Plan,
    Planner,
    describe,
    fit,
    longest_seq_len,
    memory_ladder,
    read_config,
)
from lowmem_reft.memory.predict import Setting
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.methods.table import find_method
from lowmem_reft.options import ReuseOptions, written

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.methods.card import TrainingCard
    from lowmem_reft.options import LengthOptions, PlanOptions, TrainOptions

CARD_SIZES_GIB = (8, 12, 16, 24, 48, 80)
"""Cards of the table."""


def run_plan(options: PlanOptions) -> dict[str, Any]:
    """Predict, and with ``fit`` search; print the result on standard output.

    Returns:
        ``peak_bytes``, ``breakdown_bytes``, ``fits`` (None without a card), ``reuse`` (None if
        nothing is constant) and what else ``memory.planner.Plan.as_json`` gives; with ``fit`` also
        ``longest_seq_len`` and ``train_flags`` (None if nothing fits); with ``table`` instead
        ``table``: a list with ``model``, ``method`` and ``longest_seq_len`` by card size.

    Raises:
        InputError: the model, the card or the setting is not known or impossible.
    """
    report = _reporter(quiet=options.quiet or options.json)
    if options.longest.table:
        return _run_table(options)
    card = Card.find(options.gpu, options.memory.memory_gib)
    if options.fit and card is None:
        raise InputError("gpu must be given with fit (or memory_gib), got neither; give one")
    if card is not None and options.shape.device == "cpu":
        card = replace(card, context_bytes=0)
    planner = Planner(read_config(options.shape.model), card)
    setting, lengths = setting_of(options, card), lengths_of(options.lengths)
    chosen: Candidate | None = None
    if options.fit:
        chosen = fit(planner, setting, lengths, report=report)
        if chosen is not None:
            setting, lengths = chosen.setting, chosen.lengths
    plan = planner.plan(setting, lengths, num_examples=options.store.num_examples)
    result = plan.as_json()
    console = Console(soft_wrap=True, highlight=False)
    if not options.json:
        _print_plan(console, options.shape.model, plan)
    if options.fit:
        longest = longest_seq_len(planner, setting, report=report)
        result["longest_seq_len"] = longest
        result["train_flags"] = None if chosen is None else describe(chosen)
        if not options.json:
            _print_fit(console, options, chosen, longest, plan)
    return result


def fit_into_memory(
    options: TrainOptions, card: TrainingCard, examples: Sequence[dict[str, Any]]
) -> TrainOptions:
    """Choose how a training run fits into ``--memory-gib``, before anything is loaded.

    Examples per optimizer step stay as they are, so what is learned does too.

    Args:
        options: The user's choice; without ``memory_gib`` it is returned as it is.
        card: How the base is stored and computes.
        examples: Tokenized rows, whose lengths decide.

    Raises:
        InputError: nothing fits; the message says by how much and what would help.
    """
    budget = options.memory.memory_gib
    if budget is None:
        return options
    setting, lengths = run_setting(options, card, examples)
    found = Card.find(memory_gib=budget)
    assert found is not None
    if setting.device_type == "cpu":
        found = replace(found, context_bytes=0)
    planner = Planner(read_config(options.model.model), found)
    chosen = fit(planner, setting, lengths, report=_reporter(quiet=options.run.quiet))
    if chosen is None:
        raise InputError(_refusal(planner, setting, lengths, budget))
    reuse = options.reuse
    if reuse.dequantize_upper == "auto" and reuse.reuse != "off" and not shards_model():
        has_room = _has_room_dequantized(planner, chosen, len(examples))
        reuse = replace(reuse, dequantize_upper="on" if has_room else "off")
    flags = describe(chosen) + (" --dequantize-upper on" if reuse.dequantize_upper == "on" else "")
    Console(stderr=True, soft_wrap=True, highlight=False, quiet=options.run.quiet).print(
        f"to fit into {budget:g} GiB: {flags}"
    )
    memory = replace(chosen.setting.memory, memory_gib=budget)
    optim = replace(
        options.optim,
        batch_size=chosen.lengths.batch_size,
        gradient_accumulation=chosen.lengths.gradient_accumulation,
    )
    return replace(options, memory=memory, optim=optim, reuse=reuse)


def _has_room_dequantized(planner: Planner, chosen: Candidate, num_examples: int) -> bool:
    """Return whether a run that fits also does with its upper blocks dequantized."""
    reuse = planner.reuse(chosen.setting, chosen.lengths, num_examples)
    if reuse is None or not reuse.dequantized_bytes:
        return False
    peak = planner.training_peak_bytes(chosen.setting, chosen.lengths)
    assert planner.card is not None
    return planner.card.holds(peak + reuse.dequantized_bytes)


def run_setting(
    options: TrainOptions, card: TrainingCard, examples: Sequence[dict[str, Any]]
) -> tuple[Setting, Lengths]:
    """Return what is predicted for a training run: as the user gave it, on its longest example.

    Args:
        options: The run.
        card: How the base is stored and computes.
        examples: Tokenized rows, whose lengths decide.
    """
    device = resolve_device(options.model.device)
    dtype = resolve_compute_dtype(
        card.storage if card.storage in DTYPES else card.compute_dtype, device
    )
    longest = max(len(example["input_ids"]) for example in examples)
    setting = Setting(
        storage=card.storage,
        compute_dtype=dtype_name(dtype),
        method=options.method,
        optim=options.optim.optim,
        task_type=card.task_type,
        num_labels=card.num_classes,
        # With all blocks there, the plain step must fit too: training may fall back to it.
        reuse=stored_as(options.reuse.reuse if options.reuse.resident == "upper" else "off", "all"),
        resident=options.reuse.resident,
        device_type=device.type,
        bf16=device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0),
    )
    lengths = Lengths(
        seq_len=longest,
        response_len=max(_num_supervised(example["labels"]) for example in examples),
        batch_size=options.optim.batch_size,
        gradient_accumulation=options.optim.gradient_accumulation,
    )
    return setting, lengths


def required_gib(
    options: TrainOptions, card: TrainingCard, examples: Sequence[dict[str, Any]]
) -> float:
    """Return the memory that a training run needs as the user gave it, as ``--memory-gib`` counts.

    Args:
        options: The run.
        card: How the base is stored and computes.
        examples: Tokenized rows, whose lengths decide.
    """
    setting, lengths = run_setting(options, card, examples)
    setting = replace(setting, memory=replace(options.memory, memory_gib=None))
    counted = Card(name="", memory_bytes=0)
    if setting.device_type == "cpu":
        counted = replace(counted, context_bytes=0)
    planner = Planner(read_config(options.model.model), counted)
    needed = counted.required_bytes(planner.training_peak_bytes(setting, lengths))
    return math.ceil(1e4 * needed / GIB) / 1e4


def _num_supervised(labels: Any) -> int:
    """Return the supervised tokens of an example; a class label counts as one."""
    return sum(label != IGNORED_LABEL for label in labels) if isinstance(labels, list) else 1


def _refusal(planner: Planner, setting: Setting, lengths: Lengths, budget: float) -> str:
    """Say by how much a run misses its budget, and what would help."""
    card = planner.card
    assert card is not None
    ladder = memory_ladder(planner.config, lengths.seq_len, setting)
    smallest = replace(lengths, batch_size=1, gradient_accumulation=2)
    needed = card.required_bytes(
        planner.training_peak_bytes(replace(setting, memory=ladder[-1]), smallest)
    )
    longest = longest_seq_len(planner, setting)
    helps = "choose a smaller model"
    if longest:
        helps = f"shorten the examples to --max-length {longest}, or {helps}"
    elif setting.storage not in ("nf4", "fp4"):
        helps = f"use --storage nf4, or {helps}"
    return (
        f"memory_gib must be at least {needed / GIB:.2f} for examples of {lengths.seq_len} tokens "
        f"even one at a time and with every way to save memory, got {budget:g}; {helps}"
    )


def setting_of(options: PlanOptions, card: Card | None) -> Setting:
    """Turn the options into what is predicted."""
    shape = options.shape
    compute_dtype = shape.compute_dtype
    bf16 = card is None or card.bf16
    if compute_dtype == "auto":
        compute_dtype = "bf16" if bf16 and shape.device == "cuda" else "fp32"
    storage = shape.storage or find_method(options.method.method).storage
    return Setting(
        storage=storage,
        compute_dtype=storage if storage in ("bf16", "fp16", "fp32") else compute_dtype,
        method=options.method,
        memory=options.memory,
        chunked_loss=options.loss == "chunked",
        optim=options.optim,
        task_type=shape.task_type,
        num_labels=2 if shape.task_type == "SEQ_CLS" else None,
        attn_implementation=shape.attn_implementation,
        reuse=stored_as(options.store.reuse, options.store.resident),
        resident=options.store.resident,
        device_type=shape.device,
        bf16=bf16,
    )


def stored_as(reuse: str, resident: str) -> Literal["off", "trunk", "prefix"]:
    """Return what a step is predicted to read: ``auto`` takes prefixes where there are any."""
    if reuse == "trunk":
        return "trunk"
    return "off" if reuse == "off" and resident == "all" else "prefix"


def lengths_of(options: LengthOptions) -> Lengths:
    """Turn the options into lengths."""
    return Lengths(
        seq_len=options.seq_len,
        response_len=options.response_len,
        batch_size=options.batch_size,
        gradient_accumulation=options.gradient_accumulation,
        padded=False if options.unpadded else None,
        max_new_tokens=options.max_new_tokens,
    )


def _reporter(*, quiet: bool) -> Callable[[str], None]:
    """Return what tells a person at a terminal what is being tried."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        return lambda _: None
    return lambda text: console.print(f"trying {text}", style="dim", highlight=False)


def gib(num_bytes: int) -> str:
    """Return bytes as GiB with two decimals."""
    return f"{num_bytes / GIB:.2f} GiB"


def _print_plan(console: Console, model: str, plan: Plan) -> None:
    lengths = plan.lengths
    console.print(
        f"{model}, {plan.setting.method.method} on {plan.setting.storage}: "
        f"{plan.num_trainable_params:,} trained parameters, "
        f"{lengths.batch_size} × {lengths.seq_len:,} tokens per forward pass"
    )
    table = Table("category", "GiB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name in CATEGORIES:
        if plan.breakdown_bytes.get(name):
            table.add_row(name.replace("_", " "), f"{plan.breakdown_bytes[name] / GIB:.3f}")
    table.add_row("peak of a training step", f"{plan.peak_bytes / GIB:.3f}", style="bold")
    console.print(table)
    console.print(f"the peak is at {plan.peak_place}")
    peaks = {"loading": plan.loading_peak_bytes, "scoring choices": plan.evaluation_peak_bytes}
    if plan.generation_peak_bytes is not None:
        peaks[f"generating {lengths.max_new_tokens} tokens"] = plan.generation_peak_bytes
    console.print("peaks elsewhere: " + ", ".join(f"{n} {gib(v)}" for n, v in peaks.items()))
    if plan.host_bytes:
        console.print(f"host memory for what was moved there: {gib(plan.host_bytes)}")
    _print_reuse(console, plan)
    if plan.card is not None:
        console.print(_verdict(plan, plan.card), style="bold green" if plan.fits else "bold red")


def _print_reuse(console: Console, plan: Plan) -> None:
    reuse = plan.reuse
    if reuse is None:
        console.print("--reuse has nothing to store: no block's output is constant")
        return
    what = "what leaves the first block"
    if reuse.num_constant_blocks > 1:
        what = f"what leaves the first {reuse.num_constant_blocks} blocks"
    if reuse.mode == "prefix":
        what += ", and keys and values above them of tokens before the first edit"
    console.print(f"--reuse {reuse.mode} would store {what}, for {reuse.num_examples:,} examples:")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("store per example", f"{reuse.store_bytes_per_example / 2**20:,.2f} MiB")
    limit, size = ReuseOptions().reuse_limit_gib, gib(reuse.store_bytes)
    if limit is not None and reuse.store_bytes > limit * GIB:
        size += f", above the default of --reuse-limit-gib ({limit:g})"
    table.add_row("store", size)
    table.add_row("building it", f"{reuse.build_steps:,.1f} ordinary steps")
    table.add_row("weights of the base that a step needs", gib(reuse.resident_bytes))
    if reuse.dequantized_bytes:
        fits = {None: "", True: ": fits", False: ": does not fit"}[plan.fits_dequantized]
        size = f"{gib(reuse.dequantized_bytes)} more{fits}"
        table.add_row("--dequantize-upper, for faster steps", size)
    table.add_row("an epoch, by its arithmetic", f"{reuse.speedup_per_epoch:.2f} × faster")
    console.print(table)


def _verdict(plan: Plan, card: Card) -> str:
    needs = f"{gib(plan.required_bytes)} with the driver's context and allocator gaps"
    if plan.fits:
        return f"fits: {card.name} has {gib(card.memory_bytes)}, this needs {needs}"
    missing = gib(plan.required_bytes - card.memory_bytes)
    return (
        f"does not fit: {card.name} has {gib(card.memory_bytes)}, this needs {needs}: {missing} too"
        " much; --fit looks for a setting that fits"
    )


def _print_fit(
    console: Console, options: PlanOptions, chosen: Candidate | None, longest: int, plan: Plan
) -> None:
    assert plan.card is not None
    if chosen is None:
        console.print(
            "no setting fits: not with every way to save memory and one example at a time; "
            "shorten the examples, or choose a smaller model or a larger card",
            style="bold red",
        )
    else:
        console.print("the fastest setting that fits (speed is estimated):")
        method = [
            f"--{name.replace('_', '-')} {shlex.quote(str(value))}"
            for name, value in written.values(options.method).items()
            if value is not None
        ]
        console.print(
            f"lowmem-reft train --model {shlex.quote(options.shape.model)} --data FILE.jsonl "
            f"--max-length {chosen.lengths.seq_len} {' '.join(method)} {describe(chosen)} "
            "--output-dir DIR",
            style="bold",
        )
    console.print(
        f"longest example on {plan.card.name}, one at a time and with every way to save memory: "
        f"{longest:,} tokens"
    )


def _run_table(options: PlanOptions) -> dict[str, Any]:
    """Find the longest context of every model with every method on every size of card."""
    rows: list[dict[str, Any]] = []
    models = [name.strip() for name in options.shape.model.split(",") if name.strip()]
    specs = parse_methods(options.longest.methods)
    total = len(models) * len(specs) * len(CARD_SIZES_GIB)
    with counter("finding the longest contexts", quiet=options.quiet or options.json) as done:
        for model, spec in itertools.product(models, specs):
            shape = replace(options.shape, model=model, storage=spec.storage)
            own = replace(options, shape=shape, method=spec.options)
            planner = Planner(read_config(model))
            found: dict[str, int] = {}
            for size in CARD_SIZES_GIB:
                done(len(rows) * len(CARD_SIZES_GIB) + len(found), total)
                card = Card.find(memory_gib=size)
                planner.card = card
                found[str(size)] = longest_seq_len(planner, setting_of(own, card))
            rows.append(
                {
                    "model": model,
                    "method": spec.label,
                    "storage": spec.storage,
                    "longest_seq_len": found,
                }
            )
    if not options.json:
        table = Table("model", "method", "base", *(f"{size} GB" for size in CARD_SIZES_GIB))
        for row in rows:
            lengths = (row["longest_seq_len"][str(size)] for size in CARD_SIZES_GIB)
            cells = (f"{length:,}" if length else "does not fit" for length in lengths)
            table.add_row(row["model"], row["method"], row["storage"], *cells)
        console = Console(soft_wrap=True)
        console.print("longest example in tokens, one at a time, every way to save memory on:")
        console.print(table)
    return {"table": rows}
