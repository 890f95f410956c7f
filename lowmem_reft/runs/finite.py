"""Numbers that are not finite end a run: no adapter that holds one is a result."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lowmem_reft.data.packing import token_ids
from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor, nn

    from lowmem_reft.runs.resolve import Run

MOST_ROWS = 8
"""Rows that a message names."""


def not_finite(what: str, where: str, run: Run, rows: Sequence[int] = ()) -> InputError:
    """Return the error for a number that is not finite.

    Args:
        what: The number: "loss", "gradient", "weights".
        where: When it was met: "at step 3 of 40".
        run: Whose learning rate and dtype are named.
        rows: Numbers of the rows that it was computed from, from 1, where they are known.
    """
    of_rows = ""
    if rows:
        more = ", ..." if len(rows) > MOST_ROWS else ""
        of_rows = f" (rows {', '.join(map(str, rows[:MOST_ROWS]))}{more} of data)"
    dtype = str(run.compute_dtype).removeprefix("torch.")
    look = "look at those rows" if rows else "look at the rows"
    return InputError(
        f"{what} must be finite, got nan or inf {where}{of_rows}; lower lr (now {run.optim.lr:g}), "
        f"choose another compute_dtype (now {dtype}), or {look}; what was saved before is kept"
    )


def check_weights(model: nn.Module, where: str, run: Run) -> None:
    """Refuse weights that are trained and not finite; every process has to ask.

    Raises:
        InputError: There are some.
    """
    trained = (p.detach() for p in model.parameters() if p.requires_grad)
    if processes.any_of(not _all_finite(trained)):
        raise not_finite("weights", where, run)


def check_score(summary: dict[str, Any], of: str, run: Run) -> None:
    """Refuse a loss on held-out rows that is not finite.

    Raises:
        InputError: It is not.
    """
    loss = summary.get("loss")
    if loss is not None and not math.isfinite(loss):
        raise not_finite(f"loss on {of}", "of the adapter as trained", run)


def rows_of(batch: dict[str, Any], examples: Sequence[dict[str, Any]]) -> list[int]:
    """Return the numbers, from 1, of the examples with the tokens of a batch.

    The batch is one of ``Collator``; else none are. Of equal examples all are named.
    """
    if not {"attention_mask", "position_ids"} & batch.keys():
        return []
    wanted = set(token_ids(batch))
    numbered = enumerate(examples, start=1)
    return [number for number, one in numbered if tuple(one["input_ids"]) in wanted]


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    if not local:
        return True
    return bool(torch.stack([t.isfinite().all() for t in local]).all())
