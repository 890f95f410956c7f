"""Counts the memory of one step of anybody's ``Trainer``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from lowmem_reft.base.blocks import base_of
from lowmem_reft.memory.live import LiveMemory, track

if TYPE_CHECKING:
    from torch import nn


class MemoryCallback(TrainerCallback):
    """Counts live storages in one optimizer step; read ``memory`` after the training.

    The counted step runs several times slower; the others are left alone.

    Args:
        step: Which optimizer step, from 1; the second one is the first with optimizer state.
        keep_timeline: Record every change, for ``picture.draw_timeline``.
    """

    def __init__(self, step: int = 2, *, keep_timeline: bool = True) -> None:
        self.step = step
        self.keep_timeline = keep_timeline
        self.memory: LiveMemory | None = None
        """The counter, with its ``peak`` and ``timeline``; None before the step."""
        self._stack = ExitStack()

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Begin to count."""
        if state.global_step + 1 == self.step and model is not None:
            counting = track(model=base_of(model), keep_timeline=self.keep_timeline)
            self.memory = self._stack.enter_context(counting)
            self.memory.reset_peak()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the optimizer's bytes from those of the passes."""
        if self.memory is not None:
            self.memory.phase = "optimizer"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting."""
        self._stack.close()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop counting, if the training ended inside the step."""
        self._stack.close()
