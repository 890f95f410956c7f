"""Mixins for anybody's ``Trainer``: its prompts known without labels, its frozen trunk reused.

``ReftConfig`` alone is enough to train with transformers' ``Trainer`` or TRL's; these add what a
configuration cannot::

    class ReusingSFTTrainer(ReuseMixin, SFTTrainer):
        pass
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from lowmem_reft.base.blocks import device_of
from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.options import ReuseOptions
from lowmem_reft.reft.positions import find_prompt, packed_segments
from lowmem_reft.reuse.prepare import prepare
from lowmem_reft.reuse.reuse import Reuse
from lowmem_reft.reuse.trainer import INDEX, IndexCollator, from_store

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class PromptMixin(_Trainer):
    """Tells the model the prompt where a trainer takes the labels out, as label smoothing does."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss; see ``transformers.Trainer``."""
        if inputs.get("labels") is not None:
            inputs = {**inputs, "prompt_mask": _prompt_of(inputs)}
        return super().compute_loss(model, inputs, *args, **kwargs)


def _prompt_of(inputs: dict[str, Any]) -> Tensor:
    labels = inputs["labels"]
    mask = inputs.get("attention_mask")
    attended = torch.ones_like(labels) if mask is None else mask
    return find_prompt(attended, labels, packed_segments(inputs.get("position_ids"), attended))


class ReuseMixin(_Trainer):
    """Trains from what is constant, as ``lowmem-reft train --reuse`` does, if it can.

    For trainers whose data set holds ``input_ids`` and ``labels`` when training starts: the stock
    ``Trainer``, and ``SFTTrainer`` without packing. Otherwise it says why and trains the plain way.
    The first batches are run both ways, and reuse is left out if their gradients differ.

    Args:
        reuse_options: What may be stored and where; default: reuse in the output directory.
    """

    def __init__(
        self, *args: Any, reuse_options: ReuseOptions | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.reuse_options = reuse_options or ReuseOptions()
        self.reuse: Reuse | None = None
        """What the training runs from; None if it runs the plain way."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Store what is constant, then train; see ``transformers.Trainer``."""
        if self.reuse is None and self.reuse_options.reuse != "off":
            reason = self._why_not()
            if reason is None:
                self._prepare_reuse()
            else:
                logger.warning("no frozen computation is reused: %s", reason)
        return super().train(*args, **kwargs)

    def _why_not(self) -> str | None:
        """Return why this trainer cannot train from stored constants; None if it can."""
        if not isinstance(self.train_dataset, Dataset):
            return "the data set is none of the library datasets, or a stream"
        columns = self.train_dataset.column_names
        if "seq_lengths" in columns or getattr(self, "padding_free", False):
            return "samples are packed together"
        if not {"input_ids", "labels"} <= {*columns}:
            return f"{type(self).__name__} has no input_ids and labels for each example"
        if self.label_smoother is not None or self.compute_loss_func is not None:
            return "the loss is computed from all logits"
        return None

    def _prepare_reuse(self) -> None:
        data: Any = self.train_dataset
        arguments = self.args
        # Older transformers know only the second name; newer ones warn that it is deprecated.
        name = "activation_checkpointing"
        if getattr(arguments, name if hasattr(arguments, name) else "gradient_checkpointing"):
            # Now, so that it is known that no keys and values can be reused.
            enable_activation_checkpointing(self.model)
        examples = data.select_columns(["input_ids", "labels"]).to_list()
        epochs = arguments.num_train_epochs
        if arguments.max_steps > 0:
            epochs = arguments.max_steps * self._train_batch_size / len(examples)
            epochs *= arguments.gradient_accumulation_steps * arguments.world_size
        collate: Any = self.data_collator
        device = device_of(self.model)

        def batch_of(indices: Sequence[int]) -> dict[str, Tensor]:
            batch = collate([examples[index] for index in indices])
            return {key: value.to(device) for key, value in batch.items()}

        with self.accelerator.autocast():  # as the steps will run
            self.reuse = prepare(
                self.model,
                examples,
                batch_of,
                self.reuse_options,
                root=self.reuse_options.reuse_dir or Path(str(arguments.output_dir)) / "reuse",
                batch_size=self._train_batch_size,
                epochs=epochs,
            )
        if self.reuse is not None:
            logger.info("reuse: %s", self.reuse.describe())
            self.train_dataset = data.add_column(INDEX, list(range(len(examples))))
            self.data_collator = IndexCollator(collate, self.reuse.announce)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns  # which transformers types by its first value
        if INDEX not in columns:
            columns.append(INDEX)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, from stored constants in training; see ``transformers.Trainer``."""
        indices = inputs.pop(INDEX, None)
        if self.reuse is not None and indices is not None:
            model = partial(from_store, self.reuse, model, indices.tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)
