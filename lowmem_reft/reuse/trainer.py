"""The stock Trainer with a loss from stored constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer

if TYPE_CHECKING:
    from lowmem_reft.reuse.reuse import Reuse

INDEX = "example_index"

FROM_STORE = ("input_ids", "attention_mask", "labels", "position_ids", "use_cache")
"""Arguments of a forward pass that a stored batch brings with it."""


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
        if any(INDEX not in example for example in examples):  # of an evaluation
            return self.collate(examples)
        numbers = [example[INDEX] for example in examples]
        self.announce(numbers)
        indices = torch.tensor(numbers)
        return {**self.collate(examples), INDEX: indices}


class ReuseTrainer(Trainer):
    """A Trainer whose loss is computed from what ``Reuse`` stores."""

    def __init__(self, *args: Any, reuse: Reuse, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reuse = reuse

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss of the batch's examples; see ``transformers.Trainer``."""
        indices = inputs.pop(INDEX).tolist()
        model = partial(from_store, self.reuse, model, indices)
        return super().compute_loss(model, inputs, *args, **kwargs)


def from_store(reuse: Reuse, model: Any, indices: Sequence[int], **arguments: Any) -> Any:
    """Stand in for a model: what it returns for examples, from their constants.

    Args:
        reuse: The constants.
        model: What the Trainer would call; a wrapper around the model where there are several
            processes.
        indices: Which examples.
        arguments: As the Trainer passes them.
    """
    more = {key: value for key, value in arguments.items() if key not in FROM_STORE}
    return reuse.supervised(indices, model=model, **more)
