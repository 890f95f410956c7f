"""Activation checkpointing that touches nothing below the first trainable parameter."""

from __future__ import annotations

from types import MethodType
from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem_reft.errors import InputError


def enable_activation_checkpointing(model: Any, every_n_layers: int = 1) -> None:
    """Recompute blocks in the backward pass instead of keeping their activations (non-reentrant).

    transformers makes the embeddings' output require a gradient, so that every frozen block is
    recomputed and back-propagated. Here it does not: blocks below the first trainable parameter
    belong to no graph, and the gradients are the same.

    Args:
        model: A base, or a PeftModel on one.
        every_n_layers: Checkpoint blocks 0, n, 2n, ... only; 1 is every block.

    Raises:
        InputError: not a positive number, or an architecture that has no support for it.
    """
    if every_n_layers < 1:
        raise InputError(
            f"every_n_layers must be at least 1, got {every_n_layers!r}; 1 checkpoints every block"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    stop_input_gradients(base)
    # Older transformers know only the second name; newer ones warn that it is deprecated.
    name = "activation_checkpointing_enable"
    enable = getattr(base, name if hasattr(base, name) else "gradient_checkpointing_enable")
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(
            f"activation_checkpointing must be False for {type(base).__name__}, got True; "
            "transformers has no support for it there"
        ) from error
    blocks = [block for block in base.modules() if isinstance(block, GradientCheckpointingLayer)]
    for index, block in enumerate(blocks):
        block.gradient_checkpointing = index % every_n_layers == 0


def stop_input_gradients(base: Any) -> None:
    """Undo enable_input_require_grads, and make later calls of it (Trainer's, TRL's) do nothing."""
    base.disable_input_require_grads()
    base.enable_input_require_grads = MethodType(_refuse_reentrant, base)


def _refuse_reentrant(base: Any) -> None:
    """Stand in for enable_input_require_grads, which only reentrant checkpointing needs.

    Raises:
        InputError: checkpointing is reentrant; without input gradients it would train nothing.
    """
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise InputError(
                "gradient_checkpointing_kwargs must be {'use_reentrant': False}, got "
                "{'use_reentrant': True}; it would back-propagate through every frozen block"
            )
