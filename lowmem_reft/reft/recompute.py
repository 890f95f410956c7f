"""Activation checkpoints of edited blocks: recomputed under the selection of their own pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowmem_reft.base.blocks import SUBMODULE

if TYPE_CHECKING:
    from lowmem_reft.reft.layer import CurrentSelection, ReftLayer


def keep_selection_in_recompute(model: nn.Module, current: CurrentSelection) -> None:
    """Make checkpointed blocks recompute under the selection of their own forward pass.

    MLP and attention are recomputed with their hooks, and so are whole blocks in transformers
    before 5.23; by then another forward pass may have run (a reference model in DPO, say).
    """
    if not (model.training and torch.is_grad_enabled()):
        return
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, SelectionKeepingCheckpoint):
            wrapped = SelectionKeepingCheckpoint(function, current)
            module._gradient_checkpointing_func = wrapped  # type: ignore[assignment]


class SelectionKeepingCheckpoint:
    """A checkpoint function whose recomputation sees the selection of the forward pass."""

    def __init__(self, checkpoint: Any, current: CurrentSelection) -> None:
        self.checkpoint, self.current = checkpoint, current

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``function`` checkpointed; an edit outside of it goes in."""
        selection = self.current.value
        layer = _layer_outside(function)

        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with self.current.use(selection):
                output = function(*inner_args, **inner_kwargs)
                return output if layer is None else layer.edited(output)

        output = self.checkpoint(run, *args, **kwargs)
        if layer is not None:
            layer.is_edited = True
        return output


def _layer_outside(function: Any) -> ReftLayer | None:
    """Return the ``ReftLayer`` of the block whose bare ``forward`` a checkpoint recomputes.

    transformers 5.23 leaves hooks, and so the edit, outside the checkpoint: what the edit needs for
    its gradient would then be kept for every block. Older versions have the hooks inside.
    """
    block = next(iter(getattr(function, "args", ())), None)
    return getattr(block, SUBMODULE, None) if isinstance(block, nn.Module) else None
