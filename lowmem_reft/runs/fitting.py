"""What a training run needs of a device's memory, and how it fits into less (``--memory-gib``)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import dtype_name, resolve_device
from lowmem_reft.machine.processes import shards_model
from lowmem_reft.memory.planner import GIB, Card, Planner, check_sizes
from lowmem_reft.memory.predict import Lengths, Setting, stored_as
from lowmem_reft.memory.search import (
    Candidate,
    describe,
    fit,
    longest_seq_len,
    memory_ladder,
    reporter,
)

if TYPE_CHECKING:
    from lowmem_reft.runs.resolve import Run


def fit_into_memory(run: Run) -> Run:
    """Choose how a run fits into ``--memory-gib``, before anything is loaded.

    Examples per optimizer step stay as they are, so what is learned does too. Without a budget the
    run is returned as it is.

    Raises:
        InputError: Nothing fits; the message says by how much and what would help.
    """
    options = run.options
    budget = options.memory.memory_gib
    if budget is None:
        return run
    planner, setting, lengths = _planned(run, Card.find(memory_gib=budget))
    chosen = fit(planner, setting, lengths, report=reporter(quiet=options.run.quiet))
    if chosen is None:
        raise InputError(_refusal(planner, setting, lengths, budget))
    reuse = options.reuse
    if reuse.dequantize_upper == "auto" and reuse.reuse != "off" and not shards_model():
        has_room = _has_room_dequantized(planner, chosen, len(run.examples))
        reuse = replace(reuse, dequantize_upper="on" if has_room else "off")
    flags = describe(chosen) + (" --dequantize-upper on" if reuse.dequantize_upper == "on" else "")
    quiet = options.run.quiet
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=quiet).print(
        f"to fit into {budget:g} GiB: {flags}"
    )
    memory = replace(chosen.setting.memory, memory_gib=budget)
    optim = replace(
        options.optim,
        batch_size=chosen.lengths.batch_size,
        gradient_accumulation=chosen.lengths.gradient_accumulation,
    )
    return replace(run, options=replace(options, memory=memory, optim=optim, reuse=reuse))


def required_gib(run: Run) -> float:
    """Return the memory that a run needs as the user gave it, as ``--memory-gib`` counts."""
    planner, setting, lengths = _planned(run, Card(name="", memory_bytes=0))
    setting = replace(setting, memory=replace(run.options.memory, memory_gib=None))
    assert planner.card is not None
    needed = planner.card.required_bytes(planner.training_peak_bytes(setting, lengths))
    return math.ceil(1e4 * needed / GIB) / 1e4


def _planned(run: Run, card: Card | None) -> tuple[Planner, Setting, Lengths]:
    """Return what predicts a run on a card: as the user gave it, on its longest example."""
    options = run.options
    device = resolve_device(options.model.device)
    setting = Setting(
        storage=run.card.storage,
        compute_dtype=dtype_name(run.compute_dtype),
        method=options.method,
        optim=options.optim.optim,
        task_type=run.card.task_type,
        num_labels=run.card.num_classes,
        # With all blocks there, the plain step must fit too: training may fall back to it.
        reuse=stored_as(options.reuse.reuse if options.reuse.resident == "upper" else "off", "all"),
        resident=options.reuse.resident,
        **Setting.of_device(device),
    )
    lengths = Lengths(
        seq_len=max(len(example["input_ids"]) for example in run.examples),
        response_len=max(_num_supervised(example["labels"]) for example in run.examples),
        batch_size=options.optim.batch_size,
        gradient_accumulation=options.optim.gradient_accumulation,
    )
    if card is not None and device.type == "cpu":
        card = replace(card, context_bytes=0)
    return Planner(check_sizes(run.config, options.model.model), card), setting, lengths


def _num_supervised(labels: Any) -> int:
    """Return the supervised tokens of an example; a class label counts as one."""
    return sum(label != IGNORED_LABEL for label in labels) if isinstance(labels, list) else 1


def _has_room_dequantized(planner: Planner, chosen: Candidate, num_examples: int) -> bool:
    """Return whether a run that fits also does with its upper blocks dequantized."""
    reuse = planner.reuse(chosen.setting, chosen.lengths, num_examples)
    if reuse is None or not reuse.dequantized_bytes:
        return False
    peak = planner.training_peak_bytes(chosen.setting, chosen.lengths)
    assert planner.card is not None
    return planner.card.holds(peak + reuse.dequantized_bytes)


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
