"""``lowmem-reft plan``: does it fit, what would fit, and how long may the examples be?"""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import dtype_name, resolve_storage
from lowmem_reft.machine.progress import counter
from lowmem_reft.memory.live import CATEGORIES
from lowmem_reft.memory.planner import GIB, Card, Plan, Planner, read_config
from lowmem_reft.memory.predict import Lengths, Setting, stored_as
from lowmem_reft.memory.search import Candidate, describe, fit, longest_seq_len, reporter
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.methods.table import find_method
from lowmem_reft.options import ReuseOptions, written

if TYPE_CHECKING:
    from lowmem_reft.options import LengthOptions, PlanOptions

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
        InputError: The model, the card or the setting is not known or impossible.
    """
    report = reporter(quiet=options.quiet or options.json)
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
    console = Console(soft_wrap=True, highlight=False, markup=False, quiet=options.json)
    _print_plan(console, options.shape.model, plan)
    if options.fit:
        longest = longest_seq_len(planner, setting, report=report)
        result["longest_seq_len"] = longest
        result["train_flags"] = None if chosen is None else describe(chosen)
        _print_fit(console, options, chosen, longest, plan)
    return result


def setting_of(options: PlanOptions, card: Card | None) -> Setting:
    """Turn the options into what is predicted."""
    shape = options.shape
    bf16 = card is None or card.bf16
    storage, dtype = resolve_storage(
        shape.storage,
        shape.compute_dtype,
        default=find_method(options.method.method).storage,
        has_bf16=bf16 and shape.device == "cuda",
    )
    return Setting(
        storage=storage,
        compute_dtype=dtype_name(dtype),
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


def lengths_of(options: LengthOptions) -> Lengths:
    """Turn the options into lengths."""
    given = dict(vars(options))
    return Lengths(padded=False if given.pop("unpadded") else None, **given)


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
    table = Table("category", Column("GiB", justify="right"), box=None, pad_edge=False)
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
    limit, size = ReuseOptions().reuse_limit_gib, gib(reuse.store_bytes)
    if limit is not None and reuse.store_bytes > limit * GIB:
        size += f", above the default of --reuse-limit-gib ({limit:g})"
    fits = {None: "", True: ": fits", False: ": does not fit"}[plan.fits_dequantized]
    dequantized = f"{gib(reuse.dequantized_bytes)} more{fits}" if reuse.dequantized_bytes else None
    table = Table("", Column(justify="right"), box=None, pad_edge=False, show_header=False)
    for name, value in (
        ("store per example", f"{reuse.store_bytes_per_example / 2**20:,.2f} MiB"),
        ("store", size),
        ("building it", f"{reuse.build_steps:,.1f} ordinary steps"),
        ("weights of the base that a step needs", gib(reuse.resident_bytes)),
        ("--dequantize-upper, for faster steps", dequantized),
        ("an epoch, by its arithmetic", f"{reuse.speedup_per_epoch:.2f} × faster"),
    ):
        if value is not None:
            table.add_row(name, value)
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
    table = Table("model", "method", "base", *(f"{size} GB" for size in CARD_SIZES_GIB))
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
                planner.card = Card.find(memory_gib=size)
                found[str(size)] = longest_seq_len(planner, setting_of(own, planner.card))
            known = {"model": model, "method": spec.label, "storage": spec.storage}
            rows.append(known | {"longest_seq_len": found})
            cells = (f"{length:,}" if length else "does not fit" for length in found.values())
            table.add_row(*known.values(), *cells)
    console = Console(soft_wrap=True, markup=False, quiet=options.json)
    console.print("longest example in tokens, one at a time, every way to save memory on:")
    console.print(table)
    return {"table": rows}
