"""The head on supervised tokens only: no logits for positions that the loss ignores.

A causal model's loss reads the logits before each supervised token; on a long prompt with a short
response that is a small part of the sequence, yet the head's product and its [batch, seq, vocab]
gradient are among the largest of a step. transformers computes exactly the positions in
``logits_to_keep`` and takes labels that are already shifted, so the loss stays the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers.loss.loss_utils import ForCausalLMLoss

from lowmem_reft.positions import IGNORED_LABEL


def supervised_head_arguments(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """Return what to pass to ``model`` beside ``labels`` so that only supervised tokens get logits.

    Positions are kept for the whole batch, so examples of unequal length keep a few more. Loss and
    gradients are those of the full logits.

    Args:
        model: A causal language model, with or without an adapter.
        labels: (batch, seq), -100 where a token is not supervised.

    Returns:
        ``logits_to_keep`` (kept,) and ``shift_labels`` (batch, kept); nothing if the model does not
        take them or has a loss of its own.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    takes = "logits_to_keep" in inspect.signature(base.forward).parameters
    if not takes or getattr(base, "loss_function", None) is not ForCausalLMLoss or labels.ndim != 2:
        return {}
    kept = (labels[:, 1:] != IGNORED_LABEL).any(0).nonzero()[:, 0]
    return {"logits_to_keep": kept, "shift_labels": labels[:, kept + 1]}


@dataclass(frozen=True)
class SupervisedCollator:
    """Collates with ``collate`` and adds ``supervised_head_arguments``."""

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
    """Gives a batch with ``labels``."""
    model: nn.Module
    """The model that the batch is for."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch with the arguments of the head."""
        batch = self.collate(examples)
        return {**batch, **supervised_head_arguments(self.model, batch["labels"])}
