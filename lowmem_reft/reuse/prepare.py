"""Decides what a run reuses, builds it and proves it, or says why nothing is reused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.ours import ours
from lowmem_reft.base.partial import blocks_of
from lowmem_reft.errors import InputError
from lowmem_reft.options import ReuseOptions
from lowmem_reft.reuse.disk import NoRoomError, ReuseError
from lowmem_reft.reuse.proof import prove, prove_scores
from lowmem_reft.reuse.reuse import Report, Reuse
from lowmem_reft.reuse.split import Constant, Example, NothingToReuseError, find_constant

logger = logging.getLogger(__name__)

Collate = Callable[[list[Example]], dict[str, Tensor]]
"""Makes a plain batch of examples."""

WORTHWHILE = 0.9
"""``auto`` reuses if the arithmetic of the whole run shrinks to at most this share."""


def prepare(
    model: Any,
    examples: Sequence[Example],
    collate: Collate,
    options: ReuseOptions,
    *,
    root: Path,
    batch_size: int,
    epochs: float | None,
    report: Report = lambda done, total: None,
    told: Callable[[str], None] = lambda why: None,
) -> Reuse | None:
    """Build what a run can reuse, and prove it on batches; None goes the plain way.

    Args:
        model: A PeftModel on its device, in evaluation mode to score.
        examples: The data set, with labels.
        collate: Makes a batch of some of them, as the plain step gets it or, to score,
            ``likelihood.response_log_likelihood``.
        options: What may be reused, and how much it may take.
        root: Directory of stores.
        batch_size: Examples per forward pass.
        epochs: Passes over the data that training will make. None scores by likelihood: one pass
            costs as much as a store, which is worth it for the next time.
        report: Told about progress.
        told: Told why nothing is reused where no warning says so.

    Returns:
        What to run from. If nothing can be reused, None; the reason is logged.

    Raises:
        InputError: Nothing can be reused, and only upper blocks of the base are resident.
    """
    is_partial = ours(base_of(model)).residency is not None
    if options.reuse == "off" and not is_partial:
        told("--reuse off")
        return None
    try:
        constant = find_constant(model, examples, prefix=options.reuse != "trunk")
        if epochs is not None and options.reuse == "auto" and not is_partial:
            num_tokens = sum(len(example["input_ids"]) for example in examples)
            check_worthwhile(len(blocks_of(model)), num_tokens, constant, epochs)
        reuse = _build(
            model,
            examples,
            root,
            options,
            constant=constant,
            training=epochs is not None,
            report=report,
        )
        for indices in _samples(examples, batch_size, is_partial=is_partial):
            batch = collate([examples[index] for index in indices])
            batch = {name: value.to(device_of(model)) for name, value in batch.items()}
            (prove_scores if epochs is None else prove)(reuse, indices, batch)
    except ReuseError as error:
        if is_partial:
            raise InputError(
                f"resident must be all here, got upper: no frozen computation can be reused "
                f"({error}); load the whole base"
            ) from error
        expected = options.reuse == "auto" and isinstance(error, NothingToReuseError)
        if expected:
            told(str(error))
        level = logging.INFO if expected else logging.WARNING
        logger.log(level, "no frozen computation is reused: %s", error)
        return None
    if options.reuse == "prefix" and reuse.mode != "prefix":
        logger.warning(
            "no keys and values are reused, as an edit reaches the first token or the method "
            "changes them; hidden vectors are (reuse trunk)"
        )
    return reuse


def check_worthwhile(layers: int, tokens: int, constant: Constant, epochs: float) -> None:
    """Compare the arithmetic of a reused run with that of a plain one, in blocks times tokens.

    Raises:
        NothingToReuseError: It would save too little.
    """
    upper = layers - constant.num_blocks
    kept = tokens - sum(constant.first_edited)
    plain = epochs * (layers + upper) * tokens
    share = (layers * tokens + epochs * 2 * upper * kept) / plain
    if share > WORTHWHILE:
        saved = "nothing" if share >= 1 else f"only {100 * (1 - share):.0f} %"
        raise NothingToReuseError(f"it would save {saved} of the arithmetic")


def _build(
    model: Any, examples: Sequence[Example], root: Path, options: ReuseOptions, **more: Any
) -> Reuse:
    """Build the larger store if there is room for it, else the smaller one.

    Keys and values of prefixes take most of the room; where there is not enough, they are computed
    in every step from hidden vectors.
    """
    limit = options.reuse_limit_gib
    limit_bytes = None if limit is None else round(limit * 2**30)
    build = partial(Reuse, model, examples, root, limit_bytes=limit_bytes, **more)
    try:
        return build()
    except NoRoomError:
        if not any(more["constant"].first_edited):
            raise
        return build(recompute=True)


def _samples(
    examples: Sequence[Example], batch_size: int, *, is_partial: bool
) -> Iterator[Sequence[int]]:
    """Yield batches to prove: the first one, the shortest example, and it beside the longest.

    A plain step of a partial base reads all of its lower blocks, and may need more memory than the
    upper ones leave: there, only the shortest and the longest example.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    shortest, longest = (end(range(len(lengths)), key=lengths.__getitem__) for end in (min, max))
    if not is_partial:
        yield range(min(batch_size, len(examples)))
        yield [shortest]
    yield sorted({shortest, longest})
