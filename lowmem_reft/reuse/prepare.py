"""Decides what a run reuses, builds it and proves it, or says why nothing is reused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.ours import ours
from lowmem_reft.base.partial import blocks_of
from lowmem_reft.errors import InputError
from lowmem_reft.options import ReuseOptions
from lowmem_reft.reuse.disk import NoRoomError, ReuseError
from lowmem_reft.reuse.proof import prove, prove_scores
from lowmem_reft.reuse.reuse import Report, Reuse
from lowmem_reft.reuse.split import (
    Example,
    NothingToReuseError,
    Split,
    find_split,
)

logger = logging.getLogger(__name__)

BatchOf = Callable[[Sequence[int]], dict[str, Tensor]]
"""Returns a plain batch of the examples of some indices."""

WORTHWHILE = 0.9
"""``auto`` reuses if the arithmetic of the whole run shrinks to at most this share."""


def prepare(
    model: Any,
    examples: Sequence[Example],
    batch_of: BatchOf,
    options: ReuseOptions,
    *,
    root: Path,
    batch_size: int,
    epochs: float,
    report: Report = lambda done, total: None,
) -> Reuse | None:
    """Build what a training run can reuse, and prove it on batches; None trains the plain way.

    Args:
        model: A PeftModel on its device.
        examples: The data set.
        batch_of: Returns some of the examples as the plain step gets them, on the model's device.
        options: What may be reused, and how much it may take.
        root: Directory of stores.
        batch_size: Examples per forward pass.
        epochs: Passes over the data that will be made.
        report: Told about progress.

    Returns:
        What to train from. If nothing can be reused, None; the reason is logged.

    Raises:
        InputError: nothing can be reused, and only upper blocks of the base are resident.
    """

    def build() -> Reuse:
        split = find_split(model, examples, prefix=options.reuse != "trunk")
        share = _estimated_share(model, examples, split, epochs)
        if options.reuse == "auto" and not _is_partial(model) and share > WORTHWHILE:
            raise NothingToReuseError(
                f"it would save only {100 * (1 - share):.0f} % of the arithmetic"
            )
        reuse = _build(model, examples, split, options, root, report, training=True)
        for indices in _samples(examples, batch_size, partial=_is_partial(model)):
            prove(reuse, indices, batch_of(indices))
        return reuse

    return _attempt(model, options, build)


def prepare_scoring(
    model: Any,
    examples: Sequence[Example],
    batch_of: BatchOf,
    options: ReuseOptions,
    *,
    root: Path | None,
    batch_size: int,
    report: Report = lambda done, total: None,
) -> Reuse | None:
    """Build what scoring by likelihood can reuse; None scores the plain way.

    One pass over the data costs as much as a store, so ``auto`` makes one only where it is kept for
    the next time.

    Args:
        model: A PeftModel on its device, in evaluation mode.
        examples: What is scored, with labels.
        batch_of: Returns some of the examples as ``likelihood.response_log_likelihood`` gets them.
        options: What may be reused, and how much it may take.
        root: Directory of stores; None if they would not be kept.
        batch_size: Examples per forward pass.
        report: Told about progress.

    Raises:
        InputError: nothing can be reused, and only upper blocks of the base are resident.
    """
    if root is None:
        return None

    def build() -> Reuse:
        split = find_split(model, examples, prefix=options.reuse != "trunk")
        reuse = _build(model, examples, split, options, root, report, training=False)
        for indices in _samples(examples, batch_size, partial=_is_partial(model)):
            prove_scores(reuse, indices, batch_of(indices))
        return reuse

    return _attempt(model, options, build)


def _attempt(model: Any, options: ReuseOptions, build: Callable[[], Reuse]) -> Reuse | None:
    if options.reuse == "off" and not _is_partial(model):
        return None
    try:
        reuse = build()
        if options.reuse == "prefix" and reuse.mode != "prefix":
            logger.warning(
                "no keys and values are reused, as an edit reaches the first token or the method "
                "changes them; hidden vectors are (reuse trunk)"
            )
        return reuse
    except ReuseError as error:
        if _is_partial(model):
            raise InputError(
                f"resident must be all here, got upper: no frozen computation can be reused "
                f"({error}); load the whole base"
            ) from error
        expected = options.reuse == "auto" and isinstance(error, NothingToReuseError)
        level = logging.INFO if expected else logging.WARNING
        logger.log(level, "no frozen computation is reused: %s", error)
        return None


def _samples(
    examples: Sequence[Example], batch_size: int, *, partial: bool
) -> Iterator[Sequence[int]]:
    """Yield batches to prove: the first one, the shortest example, and it beside the longest.

    A plain step of a partial base reads all of its lower blocks, and may need more memory than the
    upper ones leave: there, only the shortest and the longest example.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    shortest = min(range(len(examples)), key=lengths.__getitem__)
    longest = max(range(len(examples)), key=lengths.__getitem__)
    both = sorted({shortest, longest})
    if not partial:
        yield range(min(batch_size, len(examples)))
        yield [shortest]
    yield both


def _is_partial(model: Any) -> bool:
    return ours(base_of(model)).residency is not None


def _build(
    model: Any,
    examples: Sequence[Example],
    split: Split,
    options: ReuseOptions,
    root: Path,
    report: Report,
    *,
    training: bool,
) -> Reuse:
    """Build the larger store if there is room for it, else the smaller one.

    Keys and values of prefixes take most of the room; where there is not enough, they are computed
    in every step from hidden vectors.
    """
    limit = options.reuse_limit_gib
    rest: dict[str, Any] = {
        "training": training,
        "limit_bytes": None if limit is None else round(limit * 2**30),
        "report": report,
    }
    try:
        return Reuse(model, examples, root, split=split, **rest)
    except NoRoomError:
        if not any(split.first_edited):
            raise
        return Reuse(model, examples, root, split=split, recompute=True, **rest)


def _estimated_share(model: Any, examples: Sequence[Example], split: Split, epochs: float) -> float:
    """Return the arithmetic of a reused run over that of a plain one, in blocks times tokens."""
    layers = len(blocks_of(model))
    upper = layers - split.num_blocks
    tokens = sum(len(example["input_ids"]) for example in examples)
    kept = tokens - sum(split.first_edited)
    plain = epochs * (layers + upper) * tokens
    reused = layers * tokens + epochs * 2 * upper * kept
    return reused / plain
