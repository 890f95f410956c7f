"""Scoring by likelihood from stored constants: hidden vectors, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_reft.data.tokens import Collator
from lowmem_reft.machine.progress import counter, progress
from lowmem_reft.methods.likelihood import by_length
from lowmem_reft.options import ReuseOptions
from lowmem_reft.reuse.prepare import prepare
from lowmem_reft.reuse.reuse import Reuse


def reused_log_likelihood(
    model: Any,
    examples: Sequence[dict[str, Any]],
    tokenizer: Any,
    options: ReuseOptions,
    *,
    root: Path,
    batch_size: int,
    quiet: bool = True,
    prepared: list[Reuse] | None = None,
) -> tuple[Reuse, list[tuple[float, int]]] | None:
    """Return what ``each_log_likelihood`` does, and what it was computed from.

    Args:
        model: Causal and in evaluation mode, with an adapter.
        examples: ``input_ids`` and ``labels`` of each.
        tokenizer: Says which id pads.
        options: What may be stored, and how much room it may take.
        root: Directory of stores.
        batch_size: Sequences per forward pass.
        quiet: No progress bar.
        prepared: What has been stored and proven before; what this call does is added to it.

    Returns:
        None if nothing can be reused; the reason is logged.
    """
    batches = by_length([len(example["input_ids"]) for example in examples], batch_size)
    order = [index for batch in batches for index in batch]
    prepared = [] if prepared is None else prepared
    ordered = [examples[index] for index in order]
    reuse = next((r for r in prepared if r.model is model and r.examples == ordered), None)
    if reuse is None:
        with counter("computing what is constant", quiet=quiet) as report:
            reuse = prepare(
                model,
                ordered,
                Collator(tokenizer, padding_side="left"),
                options,
                root=root,
                batch_size=batch_size,
                epochs=None,
                report=report,
            )
        if reuse is None:
            return None
        prepared.append(reuse)
    found = [(0.0, 0)] * len(examples)
    for start in progress(range(0, len(order), batch_size), "scoring", quiet=quiet):
        places = range(start, min(start + batch_size, len(order)))
        sums, counts = reuse.log_likelihood(places)
        for place, total, count in zip(places, sums.tolist(), counts, strict=True):
            found[order[place]] = (total, count)
    return reuse, found
