"""``lowmem-reft plan``: does it fit, what would fit, and how long may the examples be?"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Column, Table

from lowmem_reft.base.hub import num_blocks
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import DTYPES, dtype_name, resolve_storage
from lowmem_reft.machine.progress import counter
from lowmem_reft.memory.command import train_command
from lowmem_reft.memory.live import CATEGORIES
from lowmem_reft.memory.planner import GIB, Card, Plan, Planner, read_config
from lowmem_reft.memory.predict import Lengths, Setting, stored_as
from lowmem_reft.memory.rows import longest_of, read_examples
from lowmem_reft.memory.search import describe, fit, longest_seq_len, reporter
from lowmem_reft.memory.upper import UpperFit, fit_upper
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.methods.table import find_method, for_base
from lowmem_reft.options import ReuseOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from lowmem_reft.options import LengthOptions, PlanOptions

CARD_SIZES_GIB = (8, 12, 16, 24, 48, 80)
"""Cards of the table."""

PROCESS_BYTES = 5 * GIB // 8
"""What a training process takes of a computer's memory beside its tensors: Python, torch,
transformers, peft and bitsandbytes (measured on Linux with the CPU build of torch)."""


def run_plan(options: PlanOptions) -> dict[str, Any]:
    """Predict, and with ``fit`` search; print the result on standard output.

    Returns:
        ``peak_bytes``, ``breakdown_bytes``, ``fits`` (None without a card), ``reuse`` (None if
        nothing is constant) and what else ``memory.planner.Plan.as_json`` gives, with
        ``process_bytes`` on a CPU; with ``fit`` also ``longest_seq_len``, ``train_flags`` and
        ``train_command`` (None if the training that was asked for does not fit), ``upper`` (None,
        or ``command`` and ``num_blocks`` of one that edits fewer blocks) and ``nothing_fits``,
        which is exit code 3; with ``table`` instead ``table``: a list with ``model``, ``method``
        and ``longest_seq_len`` by card size.

    Raises:
        InputError: The model, the card, the setting or a row is not known or impossible.
    """
    report = reporter(quiet=options.quiet or options.json)
    if options.longest.table:
        return _run_table(options)
    card = Card.find(options.gpu, options.memory.memory_gib)
    if options.fit and card is None:
        raise InputError("gpu must be given with fit (or memory_gib), got neither; give one")
    on_cpu = options.shape.device == "cpu"
    if card is not None and on_cpu:
        card = replace(card, context_bytes=0)
    planner = Planner(read_config(options.shape.model), card)
    setting, lengths = setting_of(options, planner), lengths_of(options.lengths)
    num_examples = options.store.num_examples
    if options.rows.data:
        examples, num_labels = read_examples(options, planner.config)
        setting, num_examples = replace(setting, num_labels=num_labels), len(examples)
        seq_len, response_len = longest_of(examples)
        lengths = replace(lengths, seq_len=seq_len, response_len=response_len)
    found: dict[str, Any] = {}
    if options.fit:
        found, setting, lengths = _search(options, planner, setting, lengths, report)
    plan = planner.plan(setting, lengths, num_examples=num_examples)
    result = plan.as_json() | ({"process_bytes": PROCESS_BYTES} if on_cpu else {})
    console = Console(soft_wrap=True, highlight=False, markup=False, quiet=options.json)
    _print_plan(console, options.shape.model, plan, advice=not options.fit)
    if options.fit:
        longest = longest_seq_len(planner, setting, report=report)
        _print_fit(console, found, longest, plan)
        upper = found.pop("upper")
        if upper is not None:
            upper = {"command": found.pop("upper_command"), "num_blocks": upper.changed_blocks}
        result |= {**found, "upper": upper, "longest_seq_len": longest}
    return result


def _search(
    options: PlanOptions,
    planner: Planner,
    setting: Setting,
    lengths: Lengths,
    report: Callable[[str], None],
) -> tuple[dict[str, Any], Setting, Lengths]:
    """Search what fits; return what to say of it, and the setting and lengths to show.

    With all blocks on the card the plain step must fit, as ``train`` may fall back to it.
    """
    if setting.resident == "all":
        setting = replace(setting, reuse="off")
    chosen = fit(planner, setting, lengths, report=report)
    upper, flags = None, ""
    if chosen is None:
        upper = fit_upper(planner, setting, lengths, report=report)
        if upper is not None and upper.changed_blocks is None:
            chosen, flags = upper.candidate, " --reuse trunk --resident upper"
    found: dict[str, Any] = {
        "train_flags": None if chosen is None else describe(chosen) + flags,
        "train_command": None if chosen is None else train_command(options, chosen),
        "nothing_fits": chosen is None and upper is None,
        "upper": upper,
    }
    if chosen is not None:
        setting, lengths = chosen.setting, chosen.lengths
    if upper is not None:
        found["upper_command"] = train_command(options, upper.candidate)
    return found, setting, lengths


def setting_of(options: PlanOptions, planner: Planner) -> Setting:
    """Turn the options into what is predicted for the planner's model and card.

    Raises:
        InputError: Storage and arithmetic do not go together.
    """
    shape, config = options.shape, planner.config
    bf16 = planner.card is None or planner.card.bf16
    storage, dtype = _storage_of(options, bf16=bf16)
    return Setting(
        storage=storage,
        compute_dtype=dtype_name(dtype),
        method=for_base(
            options.method,
            task_type=shape.task_type,
            num_layers=lambda: num_blocks(config),
        ),
        memory=options.memory,
        chunked_loss=options.step.loss == "chunked",
        optim=options.step.optim,
        task_type=shape.task_type,
        num_labels=2 if shape.task_type == "SEQ_CLS" else None,
        attn_implementation=shape.attn_implementation,
        reuse=stored_as(options.store.reuse, options.store.resident),
        resident=options.store.resident,
        device_type=shape.device,
        bf16=bf16,
    )


def _storage_of(options: PlanOptions, *, bf16: bool) -> tuple[Any, torch.dtype]:
    """Settle storage and arithmetic as ``train`` would: on a CPU for this machine's."""
    shape, default = options.shape, find_method(options.method.method).storage
    if shape.device == "cpu":
        return resolve_storage(shape.storage, shape.compute_dtype, "cpu", default=default)
    storage = shape.storage or default
    if storage in DTYPES and shape.compute_dtype not in ("auto", storage):
        raise InputError(
            f"compute_dtype must be auto or {storage} with storage {storage}, got "
            f"{shape.compute_dtype!r}; unquantized weights are computed with as they are stored"
        )
    return resolve_storage(storage, shape.compute_dtype, default=default, has_bf16=bf16)


def lengths_of(options: LengthOptions) -> Lengths:
    """Turn the options into lengths."""
    given = dict(vars(options))
    return Lengths(padded=False if given.pop("unpadded") else None, **given)


def gib(num_bytes: int) -> str:
    """Return bytes as GiB with two decimals."""
    return f"{num_bytes / GIB:.2f} GiB"


def _print_plan(console: Console, model: str, plan: Plan, *, advice: bool) -> None:
    lengths, method = plan.lengths, plan.setting.method
    console.print(
        f"{model}, {method.method} on {plan.setting.storage}: "
        f"{plan.num_trainable_params:,} trained parameters, "
        f"{lengths.batch_size} × {lengths.seq_len:,} tokens per forward pass"
    )
    if method.layers and method.positions:  # as the user says, or by the depth of the base
        console.print(f"edited: layers {method.layers}, positions {method.positions}")
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
    if plan.setting.device_type == "cpu":
        console.print(f"the process itself: about {gib(PROCESS_BYTES)} more, without any tensor")
    card = plan.card
    if card is not None:
        said = _verdict(plan, card)
        if advice and not plan.fits:
            said += "; --fit looks for a setting that fits"
        console.print(said, style="bold green" if plan.fits else "bold red")
        if plan.fits and not card.holds(plan.evaluation_peak_bytes):
            console.print("scoring choices in batches of this size does not fit", style="bold red")


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
        " much"
    )


def _print_fit(console: Console, found: dict[str, Any], longest: int, plan: Plan) -> None:
    assert plan.card is not None
    upper: UpperFit | None = found["upper"]
    if found["nothing_fits"]:
        console.print(
            "no setting fits: not with every way to save memory and one example at a time, nor "
            "with the last block alone on the card (--resident upper); shorten the examples, or "
            "choose a smaller model or a larger card",
            style="bold red",
        )
    elif found["train_command"] is None:
        assert upper is not None
        console.print(
            "that training does not fit, with every way to save memory and one example at a time; "
            f"this one does, {upper.in_words}:"
        )
        console.print(found["upper_command"], style="bold")
    else:
        more = "" if upper is None else f", {upper.in_words}"
        console.print(f"the fastest setting that fits (speed is estimated){more}:")
        console.print(found["train_command"], style="bold")
    if longest:
        console.print(
            f"longest example on {plan.card.name}, one at a time and with every way to save "
            f"memory: {longest:,} tokens"
        )


def _run_table(options: PlanOptions) -> dict[str, Any]:
    """Find the longest context of every model with every method on every size of card."""
    rows: list[dict[str, Any]] = []
    models = [name.strip() for name in options.shape.model.split(",") if name.strip()]
    specs = parse_methods(options.longest.methods)
    titles = ("model", "method", "base")
    widths = [
        max(map(len, column))
        for column in zip(
            titles, *((m, s.label, s.storage) for m in models for s in specs), strict=True
        )
    ]
    console = Console(soft_wrap=True, highlight=False, markup=False, quiet=options.json)
    console.print("longest example in tokens, one at a time, every way to save memory on:")
    sizes = [f"{size} GiB" for size in CARD_SIZES_GIB]
    console.print(_columns(widths, titles, sizes), style="bold")
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
                found[str(size)] = longest_seq_len(planner, setting_of(own, planner))
            known = {"model": model, "method": spec.label, "storage": spec.storage}
            rows.append(known | {"longest_seq_len": found})
            cells = [f"{length:,}" if length else "does not fit" for length in found.values()]
            console.print(_columns(widths, tuple(known.values()), cells))  # while others are sought
    return {"table": rows}


def _columns(widths: list[int], names: tuple[str, ...], cells: list[str]) -> str:
    """Return a line of the table: names to the left, cells to the right of their columns."""
    left = [f"{name:<{width}}" for name, width in zip(names, widths, strict=True)]
    return "  ".join([*left, *(f"{cell:>12}" for cell in cells)])
