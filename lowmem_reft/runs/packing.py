"""Whether examples can stand one after the other in rows as if each stood alone; tried on the base.

Encoders, recurrent blocks and some decoders look at all that stands in a row, and trained
embeddings come before each row. No list of architectures says which do; a few tokens that are run
through the base do.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lowmem_reft.base.attention import BY_TORCH, within_examples
from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.data.packing import PAIRS_FOR_TOKEN, Pack, joined, packed_rows
from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes
from lowmem_reft.machine.devices import dtype_name
from lowmem_reft.reuse.proof import TOLERANCE

if TYPE_CHECKING:
    from torch import Tensor

    from lowmem_reft.data.tokens import Collator
    from lowmem_reft.reuse.reuse import Reuse
    from lowmem_reft.runs.resolve import Run

_LENGTHS = (6, 5, 4, 8)
_ROWS = ([0, 1], [2, 3])
_MASKED = ("eager", BY_TORCH)
"""Attention that is given a mask for each row; others tell examples apart in one row alone."""


def refuse_early(run: Run) -> None:
    """Refuse packing that is asked for and cannot be, before the base is loaded.

    Raises:
        InputError: It cannot be.
    """
    if run.optim.packing == "on":
        _refuse(_by_task(run))


def packing(model: Any, collator: Collator, reuse: Reuse | None, run: Run) -> Collator:
    """Return what collates batches: packed where that is wanted and can be, with ``reuse`` as well.

    Raises:
        InputError: Packing is asked for and cannot be.
    """
    wanted = run.optim.packing
    if wanted == "off":
        return collator
    with nullcontext() if reuse is None else reuse.whole():
        why = _by_task(run) or why_not(model, reuse)
    if wanted == "on":
        _refuse(why)
    if why is None:
        pack: Pack = packed_rows
        if base_of(model).config._attn_implementation == BY_TORCH:
            pack = partial(packed_rows, pairs_for_token=PAIRS_FOR_TOKEN)
        if reuse is not None:
            reuse.pack = pack
        return replace(collator, pack=pack)
    if not run.options.run.quiet:
        print(f"packing: off, {why}", file=sys.stderr)
    return collator


def _refuse(why: str | None) -> None:
    if why is not None:
        raise InputError(
            f"packing must be auto or off here, got 'on': {why}; leave it out (--group-by-length "
            "puts examples of like lengths together, and with --reuse trunk more can be packed)"
        )


def _by_task(run: Run) -> str | None:
    if run.card.task_type != "CAUSAL_LM":
        return "a classification head reads one example of a row"
    if run.num_virtual:
        return f"{run.options.method.method} puts trained tokens before each row"
    return None


def why_not(model: Any, reuse: Reuse | None = None) -> str | None:
    """Return why examples for a model, adapted or not, must each have a row; None: they need not.

    A few tokens are run through it: packed, with other examples beside them, and padded.
    """
    base = base_of(model)
    if reuse is not None and reuse.mode == "prefix":
        return "keys and values of prefixes are reused, which belong to one example each"
    if processes.shards_model():
        return "each process holds a part of the base"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return f"{type(base).__name__} takes no position_ids, by which it could tell examples apart"
    attention = base.config._attn_implementation
    if attention not in _MASKED:
        return f"attention is {attention}, which masks no rows"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), within_examples():
            return _tried(model)
    finally:
        model.train(was_training)


def _tried(model: Any) -> str | None:
    base = base_of(model)
    number = base.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    first, other = (
        [torch.randint(number, (n,), generator=generator).tolist() for n in _LENGTHS]
        for _ in range(2)
    )
    packed = _packed(model, first)
    for kept in ([0, 2], [1, 3]):  # those before others, and those after them
        changed = [first[i] if i in kept else other[i] for i in range(len(first))]
        beside = _packed(model, changed)
        if not all(torch.equal(packed[index], beside[index]) for index in kept):
            name = type(base).__name__
            return f"what {name} computes of an example depends on those beside it in a row"
    tolerance = TOLERANCE[dtype_name(base.get_input_embeddings().weight.dtype)]
    for index, ids in enumerate(first):
        alone = _logits(model, input_ids=[ids])[0]
        if not (packed[index] - alone).norm() <= tolerance * alone.norm():
            return (
                f"what {type(base).__name__} computes of an example depends on its place in a row"
            )
    return None


def _packed(model: Any, examples: list[list[int]]) -> list[Tensor]:
    """Return the logits of each example, from rows that hold two of them each."""
    rows = joined(examples, _ROWS)
    places = joined([range(len(ids)) for ids in examples], _ROWS)
    width = max(map(len, rows))
    rows, places = ([row + [0] * (width - len(row)) for row in each] for each in (rows, places))
    logits = _logits(model, input_ids=rows, position_ids=places)
    found = []
    for row, indices in zip(logits, _ROWS, strict=True):
        found += row[: sum(len(examples[i]) for i in indices)].split(
            [len(examples[i]) for i in indices]
        )
    return found


def _logits(model: Any, **arguments: list[list[int]]) -> Tensor:
    device = device_of(base_of(model))
    given = {name: torch.tensor(rows, device=device) for name, rows in arguments.items()}
    logits: Tensor = model(**given)["logits"]
    return logits
