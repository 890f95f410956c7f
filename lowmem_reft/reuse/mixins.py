"""Trainers that train from a store, and mixins for anybody's ``Trainer``.

``ReftConfig`` alone is enough to train with transformers' ``Trainer`` or TRL's; the mixins add what
a configuration cannot: prompts known without labels, and reuse::

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
from transformers import Trainer

from lowmem_reft.base.checkpointing import enable_activation_checkpointing
from lowmem_reft.errors import InputError
from lowmem_reft.options import ReuseOptions
from lowmem_reft.reft.positions import find_prompt, has_later_prompt, packed_segments
from lowmem_reft.reft.tuner import reft_configs
from lowmem_reft.reuse.prepare import prepare
from lowmem_reft.reuse.reuse import Reuse

logger = logging.getLogger(__name__)

INDEX = "example_index"

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class PromptMixin(_Trainer):
    """Tells the model the prompt where a trainer takes the labels out, as label smoothing does."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss; see ``transformers.Trainer``."""
        if inputs.get("labels") is not None:
            labels, mask = inputs["labels"], inputs.get("attention_mask")
            mask = torch.ones_like(labels) if mask is None else mask
            segments = packed_segments(inputs.get("position_ids"), mask)
            is_alike = all(config.edits_alike for config in reft_configs(model))
            if has_later_prompt(mask, labels, segments) and not is_alike:
                raise InputError(
                    "labels must supervise one answer in an example where a trainer takes them "
                    "out, got several with prompts between them; split conversations with "
                    "lowmem_reft.data.split_turns"
                )
            inputs = {**inputs, "prompt_mask": find_prompt(mask, labels, segments)}
        return super().compute_loss(model, inputs, *args, **kwargs)


class ReuseMixin(_Trainer):
    """Trains from a store, as ``lowmem-reft train --reuse`` does, if it can.

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
        """Return why this trainer cannot train from a store; None if it can."""
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
        with self.accelerator.autocast():  # as the steps will run
            reuse = prepare(
                self.model,
                examples,
                collate,
                self.reuse_options,
                root=self.reuse_options.reuse_dir or Path(str(arguments.output_dir)) / "reuse",
                batch_size=self._train_batch_size,
                epochs=epochs,
            )
        if reuse is not None:
            logger.info("reuse: %s", reuse.describe())
            self._start_from(reuse)

    def _start_from(self, reuse: Reuse) -> None:
        """Let every batch say which examples it holds, and begin to read them."""
        data: Any = self.train_dataset
        collate: Any = self.data_collator
        self.reuse = reuse
        numbers = list(range(len(reuse.examples)))
        if isinstance(data, Dataset):
            self.train_dataset = data.add_column(INDEX, numbers)
        else:
            self.train_dataset = [
                {**row, INDEX: number} for row, number in zip(data, numbers, strict=True)
            ]
        self.data_collator = partial(_collate, collate, reuse)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns  # which transformers types by its first value
        if INDEX not in columns:
            columns.append(INDEX)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, from the store in training; see ``transformers.Trainer``."""
        indices = inputs.pop(INDEX, None)
        if self.reuse is not None and indices is not None:
            model = partial(self.reuse.supervised, indices.tolist(), model=model)
        return super().compute_loss(model, inputs, *args, **kwargs)


class ReuseTrainer(ReuseMixin, Trainer):
    """The stock Trainer with a store that is there already."""

    def __init__(self, *args: Any, reuse: Reuse, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._start_from(reuse)


def _collate(collate: Any, reuse: Reuse, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Collate, and add which examples the batch holds, (batch,), unless it is of an evaluation.

    Data loaders of accelerate collate a batch before the one before it is trained on, so what is
    stored of it is read meanwhile.
    """
    batch: dict[str, Tensor] = collate(rows)
    if any(INDEX not in row for row in rows):
        return batch
    numbers = [row[INDEX] for row in rows]
    reuse.announce(numbers)
    return {**batch, INDEX: torch.tensor(numbers)}
