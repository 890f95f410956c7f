"""How likely a model with any adapter holds the supervised tokens of a batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.loss import CHUNK_BYTES, log_likelihood_of
from lowmem_reft.errors import InputError
from lowmem_reft.machine.marks import allocates
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
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        inputs |= prompt_arguments(model, labels)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        del inputs["position_ids"]
    return log_likelihood_of(
        base,
        labels,
        lambda **more: called(**inputs, use_cache=False, **more),
        chunk_bytes=chunk_bytes,
    )


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
