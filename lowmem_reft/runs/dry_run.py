"""What a training would be, and whether its memory suffices: ``train --dry-run``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowmem_reft.machine.files import plain
from lowmem_reft.options import written
from lowmem_reft.runs.fitting import predicted

if TYPE_CHECKING:
    from lowmem_reft.runs.resolve import Run


def dry_run(run: Run) -> dict[str, Any]:
    """Predict a run that was resolved and, where that was needed, fitted into memory.

    Returns:
        What `fitting.predicted` does, ``num_examples``, ``num_steps``, and ``options``: every
        option of ``train`` as it was given or resolved.

    Raises:
        InputError: The memory of this kind of model or optimizer cannot be predicted.
    """
    chosen = {
        **written.values(run.options),
        **run.as_resolved,
        "memory_gib": run.options.memory.memory_gib,
    }
    return {
        **predicted(run),
        "num_examples": len(run.examples),
        "num_steps": run.num_steps,
        "options": plain({name: value for name, value in chosen.items() if value is not None}),
    }
