"""How likely a model with any adapter holds the supervised tokens of a batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.loss import CHUNK_BYTES, log_likelihood_of
from lowmem_reft.data.tokens import Collator
from lowmem_reft.errors import InputError
from lowmem_reft.machine.marks import allocates
from lowmem_reft.machine.progress import progress
from lowmem_reft.methods.virtual_tokens import embeds_virtual_tokens, with_virtual_tokens
from lowmem_reft.reft.tuner import prompt_arguments


@torch.no_grad()
@allocates("loss")
def response_log_likelihood(
    model: Any, batch: dict[str, Tensor], *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[Tensor, list[int]]:
    """Return each example's summed log-likelihood of supervised tokens, (batch,), and their number.

    The model is causal and in evaluation mode, with or without an adapter. ``batch`` has
    ``input_ids``, ``attention_mask`` and ``labels``, each (batch, seq).
    """
    run, labels = forward_of(model, batch)
    return log_likelihood_of(base_of(model), labels, run, chunk_bytes=chunk_bytes)


def each_log_likelihood(
    model: Any,
    examples: Sequence[dict[str, Any]],
    tokenizer: Any,
    *,
    batch_size: int,
    quiet: bool = True,
) -> list[tuple[float, int]]:
    """Return of each example what ``response_log_likelihood`` does, in their order.

    Args:
        model: As there.
        examples: ``input_ids`` and ``labels`` of each.
        tokenizer: Says which id pads.
        batch_size: Sequences per forward pass.
        quiet: No progress bar.
    """
    collate = Collator(tokenizer, padding_side="left")
    found = [(0.0, 0)] * len(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    for batch in progress(by_length(lengths, batch_size), "scoring", quiet=quiet):
        sums, counts = response_log_likelihood(model, collate([examples[i] for i in batch]))
        for index, total, count in zip(batch, sums.tolist(), counts, strict=True):
            found[index] = (total, count)
    return found


def by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the indices of each batch: like lengths together, for little padding, longest first.

    Too little memory shows at once then.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@allocates("loss")
def forward_of(model: Any, batch: dict[str, Tensor]) -> tuple[Callable[..., Any], Tensor]:
    """Return the forward pass over a batch, and its labels as they stand in what that reads.

    The pass takes further arguments; without them it keeps no cache. The mask has more columns than
    there are tokens where some have been read into a cache, which is such an argument then. Trained
    tokens that are embeddings stand between the padding and the prompt, labels (batch, virtual +
    seq) with them.
    """
    labels, base = batch["labels"], base_of(model)
    device = device_of(base)
    # A prediction on the meta device needs the values of the masks as well.
    there = "cpu" if device.type == "meta" else device
    inputs = {key: value.to(there) for key, value in batch.items() if key != "labels"}
    called = model
    if embeds_virtual_tokens(model):
        called = base
        inputs = with_virtual_tokens(model, inputs["input_ids"], inputs["attention_mask"], labels)
        labels = inputs.pop("labels")
    else:
        # Absolute positions (GPT-2) count from the first token, not from the padding.
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs["position_ids"] = positions[:, -labels.shape[1] :]
        inputs |= prompt_arguments(model, labels)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        del inputs["position_ids"]
    return lambda **more: called(**inputs, **{"use_cache": False, **more}), labels


def check_finite(values: Iterable[float], source: str, what: str = "log-likelihood") -> None:
    """Refuse what a model gives for a row where it is no finite number: no answer is the best one.

    Args:
        values: What it gives.
        source: The row, as it is named to the user.
        what: What the values are.

    Raises:
        InputError: One of them is NaN or infinite.
    """
    wrong = next((value for value in values if not math.isfinite(value)), None)
    if wrong is not None:
        raise InputError(
            f"{source}: {what} must be a finite number, got {wrong} from the model; look for NaN "
            "in the base's and the adapter's weights, or compute in bf16 or fp32 (--compute-dtype)"
        )
