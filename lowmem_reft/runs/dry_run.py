"""What a training would be, and whether its memory suffices: ``train --dry-run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_reft.machine import processes
from lowmem_reft.machine.devices import resolve_device
from lowmem_reft.machine.files import plain
from lowmem_reft.memory.available import free_card
from lowmem_reft.memory.planner import Card
from lowmem_reft.options import written
from lowmem_reft.runs.fitting import planned

if TYPE_CHECKING:
    from lowmem_reft.runs.resolve import Run


def dry_run(run: Run) -> dict[str, Any]:
    """Predict a run that was resolved and, where that was needed, fitted into memory.

    Returns:
        ``fits`` (into ``memory_gib`` or what is free on the device; None where that is not known),
        ``peak_bytes`` of a training step's tensors, ``required_bytes`` and ``memory_bytes`` of the
        device, ``num_examples``, ``num_steps``, and ``options``: every option of ``train`` as it
        was given or resolved.

    Raises:
        InputError: The memory of this kind of model or optimizer cannot be predicted.
    """
    options = run.options
    budget = options.memory.memory_gib
    device = resolve_device(options.model.device)
    card = free_card(device) if budget is None else Card.find(memory_gib=budget)
    planner, setting, lengths = planned(run, card)
    needed = planner.needed_bytes(setting, lengths)
    card = planner.card
    chosen = {**written.values(options), **run.as_resolved, "memory_gib": budget}
    return {
        "fits": None if card is None else card.holds(needed),
        "peak_bytes": planner.training_peak_bytes(setting, lengths),
        "required_bytes": needed if card is None else card.required_bytes(needed),
        "memory_bytes": None if card is None else card.memory_bytes,
        "num_examples": len(run.examples),
        "num_steps": run.optim.num_steps(
            len(run.examples), num_processes=processes.num_processes()
        ),
        "options": plain({name: value for name, value in chosen.items() if value is not None}),
    }
