"""The stock Trainer with a loss from stored constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

if TYPE_CHECKING:
    from lowmem_reft.frozen.reuse import Reuse

INDEX = "example_index"


@dataclass(frozen=True)
class IndexCollator:
    """Collates with ``collate`` and adds which examples the batch holds.

    Data loaders of accelerate collate a batch before the one before it is trained on, so its
    constants are read meanwhile.
    """

    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]
    """Pads and stacks ``input_ids`` and ``labels``."""
    announce: Callable[[Sequence[int]], None] = lambda indices: None
    """Told which examples will be asked for."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch with ``example_index``, (batch,)."""
        numbers = [example[INDEX] for example in examples]
        self.announce(numbers)
        indices = torch.tensor(numbers)
        return {**self.collate(examples), INDEX: indices}


class ReuseTrainer(Trainer):
    """A Trainer whose loss is computed from what ``Reuse`` stores."""

    def __init__(self, *args: Any, reuse: Reuse, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reuse = reuse

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of the batch's examples; see ``transformers.Trainer``."""
        indices = inputs[INDEX].tolist()
        loss = self.reuse.loss(indices, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss
