"""What a training run needs of a device's memory, and how it fits into less.

That is what ``--memory-gib`` says, or without it what is free on the device.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from lowmem_reft.base.stored import in_one_line
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import dtype_name, resolve_device
from lowmem_reft.machine.processes import num_processes, shards_model
from lowmem_reft.memory.available import free_card, most_bytes
from lowmem_reft.memory.planner import GIB, Card, Planner, check_sizes
from lowmem_reft.memory.predict import OPTIMIZERS, Lengths, Setting, stored_as
from lowmem_reft.memory.rows import longest_of
from lowmem_reft.memory.search import (
    Candidate,
    describe,
    fit,
    longest_seq_len,
    memory_ladder,
    reporter,
)
from lowmem_reft.memory.upper import fit_upper
from lowmem_reft.methods.table import find_method
from lowmem_reft.options import written
from lowmem_reft.runs.resolve import resolve

if TYPE_CHECKING:
    from lowmem_reft.options import TrainOptions
    from lowmem_reft.runs.resolve import Run


def fit_into_memory(run: Run) -> Run:
    """Choose how a run fits into ``--memory-gib``, before anything is loaded.

    Examples per optimizer step stay as they are, so what is learned does too. Without a budget it
    is what is free on the device: a run that fits is returned as it is, and so is one with
    ``--no-fit``, of several processes, or whose memory is not predicted.

    Raises:
        InputError: Nothing fits; the message says by how much and what would help.
    """
    options = run.options
    budget = options.memory.memory_gib
    if budget is None:
        return _fit_into_what_is_free(run)
    planner, setting, lengths = planned(run, Card.find(memory_gib=budget))
    chosen = fit(planner, setting, lengths, report=reporter(quiet=options.run.quiet))
    if chosen is None:
        raise InputError(_refusal(planner, setting, lengths, f"got {budget:g}"))
    return _changed(run, planner, chosen, f"to fit into {budget:g} GiB")


def _fit_into_what_is_free(run: Run) -> Run:
    """Choose how a run that would not fit into what is free does."""
    options = run.options
    if options.run.no_fit or num_processes() > 1:
        return run
    card = free_card(resolve_device(options.model.device))
    if card is None or not _is_predicted(run):
        return run
    planner, setting, lengths = planned(run, card)
    try:
        if card.holds(most_bytes(run.config, setting, lengths, num_virtual=run.num_virtual)):
            return run
        needed = planner.needed_bytes(setting, lengths)
        if card.holds(needed):
            return run
        chosen = fit(planner, setting, lengths, report=reporter(quiet=options.run.quiet))
    except Exception as error:  # of a kind of model that cannot be predicted, but may be trained
        warnings.warn(
            "whether the run fits into the memory that is free is not known: its memory cannot be "
            f"predicted ({in_one_line(error)})",
            stacklevel=2,
        )
        return run
    free = f"{card.memory_bytes / GIB:.2f}"
    if chosen is None:
        refusal = _refusal(planner, setting, lengths, f"got {free} free on {card.name}")
        raise InputError(f"{refusal}; --no-fit runs it as it is given")
    would_need = f"{card.required_bytes(needed) / GIB:.2f}"
    why = f"{free} GiB are free on {card.name} and the run needs {would_need}; to fit"
    return _changed(run, planner, chosen, why)


def _is_predicted(run: Run) -> bool:
    """Return whether the memory of the run's optimizer is known, or next to nothing."""
    optim, method = run.options.optim.optim, run.options.method.method
    return optim in OPTIMIZERS or find_method(method).family != "weights"


def _changed(run: Run, planner: Planner, chosen: Candidate, why: str) -> Run:
    """Return the run as it was chosen, and say what differs from what was given."""
    options = run.options
    reuse, room = options.reuse, ""
    if reuse.dequantize_upper == "auto" and reuse.reuse != "off" and not shards_model():
        has_room = _has_room_dequantized(planner, chosen, len(run.examples))
        reuse = replace(reuse, dequantize_upper="on" if has_room else "off")
        room = "; there is room for --dequantize-upper on" if has_room else ""
    memory = replace(chosen.setting.memory, memory_gib=options.memory.memory_gib)
    optim = replace(
        options.optim,
        batch_size=chosen.lengths.batch_size,
        gradient_accumulation=chosen.lengths.gradient_accumulation,
    )
    fitted = replace(options, memory=memory, optim=optim)
    quiet = options.run.quiet
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=quiet).print(
        f"{why}: {changed_flags(options, fitted) or 'nothing to change'}{room}"
    )
    return replace(run, options=replace(fitted, reuse=reuse))


def changed_flags(before: TrainOptions, after: TrainOptions) -> str:
    """Return the flags of ``train`` in which options differ from others, as they are in these."""
    given, flags = written.values(before), list[str]()
    for name, value in written.values(after).items():
        if value != given[name]:
            flags += [written.flag(name)] if value is True else [written.flag(name), str(value)]
    return " ".join(flags)


def setting_that_fits(options: TrainOptions) -> str | None:
    """Return the flags with which a run that went out of memory would have fitted.

    The prediction was too low, or other programs took memory meanwhile: so it takes a tenth less
    than the run as it was given is predicted to take, and than what is free without this process.

    Returns:
        Flags of ``train``; None if there are none, or it is not known.
    """
    try:
        run, device = resolve(options), resolve_device(options.model.device)
        card = free_card(device)
        if card is None or not _is_predicted(run):
            return None
        planner, setting, lengths = planned(run, card)
        needed = card.required_bytes(planner.needed_bytes(setting, lengths))
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        less = round(0.9 * min(needed, card.memory_bytes + held))
        planner.card = replace(card, memory_bytes=less)
        chosen = fit(planner, setting, lengths)
    except Exception:  # this is advice beside an error, which is what is to be told
        return None
    return None if chosen is None else describe(chosen)


def required_gib(run: Run) -> float:
    """Return the memory that a run needs as the user gave it, as ``--memory-gib`` counts."""
    planner, setting, lengths = planned(run, Card(name="", memory_bytes=0))
    assert planner.card is not None
    needed = planner.card.required_bytes(planner.needed_bytes(setting, lengths))
    return math.ceil(1e4 * needed / GIB) / 1e4


def predicted(run: Run) -> dict[str, Any]:
    """Predict the memory of a run, which goes by ``--memory-gib`` or what is free on its device.

    Returns:
        ``fits`` (None where the memory there is is not known), ``peak_bytes`` of a training step's
        tensors, ``required_bytes`` from loading on, with what the driver takes, and
        ``memory_bytes`` of the device.

    Raises:
        InputError: The memory of this kind of model or optimizer cannot be predicted.
    """
    budget, device = run.options.memory.memory_gib, resolve_device(run.options.model.device)
    card = free_card(device) if budget is None else Card.find(memory_gib=budget)
    planner, setting, lengths = planned(run, card)
    needed, card = planner.needed_bytes(setting, lengths), planner.card
    return {
        "fits": None if card is None else card.holds(needed),
        "peak_bytes": planner.training_peak_bytes(setting, lengths),
        "required_bytes": needed if card is None else card.required_bytes(needed),
        "memory_bytes": None if card is None else card.memory_bytes,
    }


def planned(run: Run, card: Card | None) -> tuple[Planner, Setting, Lengths]:
    """Return what predicts a run on a card: as the user gave it, on its longest example.

    AdamW stands for an optimizer that is not predicted: of an adapter both are small.
    """
    options, optim = run.options, run.options.optim.optim
    device = resolve_device(options.model.device)
    setting = Setting(
        storage=run.card.storage,
        compute_dtype=dtype_name(run.compute_dtype),
        method=options.method,
        memory=replace(options.memory, memory_gib=None),
        optim=optim if optim in OPTIMIZERS or not _is_predicted(run) else "adamw_torch",
        task_type=run.card.task_type,
        num_labels=run.card.num_classes,
        # With all blocks there, the plain step must fit too: training may fall back to it.
        reuse=stored_as(options.reuse.reuse if options.reuse.resident == "upper" else "off", "all"),
        resident=options.reuse.resident,
        **Setting.of_device(device),
    )
    seq_len, response_len = longest_of(run.examples)
    lengths = Lengths(
        seq_len=seq_len,
        response_len=response_len,
        batch_size=options.optim.batch_size,
        gradient_accumulation=options.optim.gradient_accumulation,
    )
    if card is not None and device.type == "cpu":
        card = replace(card, context_bytes=0)
    return Planner(check_sizes(run.config, options.model.model), card), setting, lengths


def _has_room_dequantized(planner: Planner, chosen: Candidate, num_examples: int) -> bool:
    """Return whether a run that fits also does with its upper blocks dequantized."""
    reuse = planner.reuse(chosen.setting, chosen.lengths, num_examples)
    if reuse is None or not reuse.dequantized_bytes:
        return False
    peak = planner.training_peak_bytes(chosen.setting, chosen.lengths)
    assert planner.card is not None
    return planner.card.holds(peak + reuse.dequantized_bytes)


def _refusal(planner: Planner, setting: Setting, lengths: Lengths, got: str) -> str:
    """Say by how much a run misses the memory there is, and what would help."""
    card = planner.card
    assert card is not None
    ladder = memory_ladder(planner.config, lengths.seq_len, setting)
    smallest = replace(lengths, batch_size=1, gradient_accumulation=2)
    way = replace(setting, memory=ladder[-1])
    needed = card.required_bytes(planner.needed_bytes(way, smallest))
    helps = "choose a smaller model"
    if longest := longest_seq_len(planner, setting):
        helps = f"shorten the examples to --max-length {longest}, or {helps}"
    elif setting.storage not in ("nf4", "fp4"):
        helps = f"use --storage nf4, or {helps}"
    elif upper := fit_upper(planner, setting, lengths):
        layers = ""
        if upper.changed_blocks is not None:
            layers = f" --layers {upper.candidate.setting.method.layers}"
        helps = f"add --resident upper --reuse trunk{layers} ({upper.in_words}), or {helps}"
    return (
        f"memory_gib must be at least {needed / GIB:.2f} for examples of {lengths.seq_len} tokens "
        f"even one at a time and with every way to save memory, {got}; {helps}"
    )
