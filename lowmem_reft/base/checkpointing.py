"""Activation checkpointing that touches nothing below the first trainable parameter."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lowmem_reft.base.blocks import base_of
from lowmem_reft.errors import InputError


def enable_activation_checkpointing(
    model: Any, every_n_layers: int = 1, *, offload: bool = False
) -> None:
    """Recompute blocks in the backward pass instead of keeping their activations (non-reentrant).

    transformers makes the embeddings' output require a gradient, so that every frozen block is
    recomputed and back-propagated. Here it does not: blocks below the first trainable parameter
    belong to no graph, and the gradients are the same.

    Args:
        model: A base, or a PeftModel on one.
        every_n_layers: Checkpoint blocks 0, n, 2n, ... only; 1 is every block.
        offload: Keep the inputs of checkpointed blocks, (batch, seq, hidden) each, in pinned host
            memory until they are needed. On a CPU there is nowhere else to go: no effect.

    Raises:
        InputError: Not a positive number, or an architecture that has no support for it.
    """
    if every_n_layers < 1:
        raise InputError(
            f"every_n_layers must be at least 1, got {every_n_layers!r}; 1 checkpoints every block"
        )
    base = base_of(model)
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
        if offload:
            function: Any = OffloadedCheckpoint(block._gradient_checkpointing_func)
            block._gradient_checkpointing_func = function


class OffloadedCheckpoint:
    """A checkpoint function whose block's input waits in host memory.

    Copies are asynchronous on the current stream, so a block's arithmetic does not wait for the one
    that leaves; the one that comes back is waited for.
    """

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint
        self.keywords = getattr(checkpoint, "keywords", {})

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``function`` checkpointed; what it saves itself is dropped and recomputed as ever."""
        # Inside, checkpointing installs hooks of its own: these see the inputs alone.
        with torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host):
            return self.checkpoint(function, *args, **kwargs)


def _to_host(tensor: Tensor) -> Any:
    if tensor.is_meta:  # a prediction: the device's memory is freed, the host's is not used
        return tensor.shape, tensor.dtype
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _from_host(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    first, second = packed
    if isinstance(second, Tensor):
        return second.to(first, non_blocking=True)
    return torch.empty(first, dtype=second, device="meta")


def stop_input_gradients(base: Any) -> None:
    """Undo enable_input_require_grads, and make later calls of it (Trainer's, TRL's) do nothing."""
    base.disable_input_require_grads()
    # Not a bound method: pickle would look it up by its name in the class.
    base.enable_input_require_grads = partial(_refuse_reentrant, base)


def _refuse_reentrant(base: Any) -> None:
    """Stand in for enable_input_require_grads, which only reentrant checkpointing needs.

    Raises:
        InputError: Checkpointing is reentrant; without input gradients it would train nothing.
    """
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise InputError(
                "gradient_checkpointing_kwargs must be {'use_reentrant': False}, got "
                "{'use_reentrant': True}; it would back-propagate through every frozen block"
            )
