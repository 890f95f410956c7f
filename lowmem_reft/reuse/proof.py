"""Compares a reused step with the plain one, so that a wrong constant is never trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_reft.base.blocks import device_of
from lowmem_reft.machine.devices import dtype_name, seed_kept
from lowmem_reft.machine.processes import shards_model
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.reuse.disk import ReuseError
from lowmem_reft.reuse.reuse import Reuse
from lowmem_reft.reuse.split import feeding_errors

TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Largest relative difference, in L2, between the gradients of the reused and the plain step."""


def prove(reuse: Reuse, indices: Sequence[int], batch: dict[str, Tensor]) -> float:
    """Compare the reused step with the plain one; return the relative gradient difference.

    ``batch`` is what the plain step gets of these examples: ``input_ids``, ``attention_mask``,
    ``labels``. What the plain step keeps for its backward pass and the reused one does not is noted
    in ``reuse.spared_bytes``.

    Raises:
        ReuseError: Losses or gradients differ by more than rounding; the message names the
            module whose gradient is furthest off.
    """
    model, device = reuse.model, device_of(reuse.base)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fork = partial(seed_kept, device)
    gradients = partial(torch.autograd.grad, inputs=list(trained.values()), allow_unused=True)
    was_training = model.training
    model.train()
    try:
        with reuse.whole(), fork():
            with _kept(model) as kept:
                plain_loss = model(**batch)["loss"]
            plain = gradients(plain_loss)
        with feeding_errors(reuse.base), fork():
            with _kept(model) as kept_of_reused:
                loss = reuse.loss(indices)
            reused = gradients(loss)
    finally:
        model.train(was_training)
    tolerance = _tolerance(reuse)
    worst, total = _largest_difference(list(trained), plain, reused)
    before, after = plain_loss.item(), loss.item()
    off = abs(after - before) / max(abs(before), 1e-12)
    if not (total <= tolerance and off <= tolerance):
        raise ReuseError(
            f"gradients differ by {total:.1e} and the loss by {off:.1e} (at most "
            f"{tolerance:.0e} would be rounding), most of all in {worst}"
        )
    if reuse.residency is None and not shards_model():
        spared = sum(kept.values()) - sum(kept_of_reused.values())
        reuse.spared_bytes = max(reuse.spared_bytes, spared)
    return total


@contextmanager
def _kept(model: Any) -> Iterator[dict[int, int]]:
    """Note the sizes, by address, of what a forward pass keeps for its backward pass.

    Parameters do not count, nor what operators of other libraries keep in their own ways.
    """
    kept: dict[int, int] = {}
    stay = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stay:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, an output would keep its own graph

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def prove_scores(reuse: Reuse, indices: Sequence[int], batch: dict[str, Tensor]) -> float:
    """Compare scores from a store with plain ones; return the relative difference.

    The model is in evaluation mode; ``batch`` is for ``likelihood.response_log_likelihood``.

    Raises:
        ReuseError: Log-likelihoods differ by more than rounding.
    """
    with reuse.whole():
        plain, _ = response_log_likelihood(reuse.model, batch)
    with feeding_errors(reuse.base):
        reused, _ = reuse.log_likelihood(indices)
    off = float((plain - reused).norm() / plain.norm().clamp(min=1e-12))
    tolerance = _tolerance(reuse)
    if not off <= tolerance:
        raise ReuseError(
            f"log-likelihoods differ by {off:.1e} (at most {tolerance:.0e} would be rounding)"
        )
    return off


def _tolerance(reuse: Reuse) -> float:
    """Return the tolerance of what the step computes in: under autocast, less than it stores."""
    kind = device_of(reuse.base).type
    is_cast = kind != "meta" and torch.is_autocast_enabled(kind)
    return TOLERANCE[dtype_name(torch.get_autocast_dtype(kind)) if is_cast else reuse.layout.dtype]


def _largest_difference(
    names: list[str], plain: Sequence[Tensor | None], reused: Sequence[Tensor | None]
) -> tuple[str, float]:
    """Return the parameter that differs most, and the relative L2 difference of all."""
    squares: dict[str, float] = {}
    norm = 0.0
    for name, *pair in zip(names, plain, reused, strict=True):
        a, b = (torch.zeros(()) if gradient is None else gradient.double() for gradient in pair)
        squares[name] = float((a - b).square().sum())
        norm += float(a.square().sum())
    worst = max(squares, key=squares.__getitem__, default="")
    total = sum(squares.values())
    off = (total / norm) ** 0.5 if norm else float("inf") if total else 0.0
    return worst, off
