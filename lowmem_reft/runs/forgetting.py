"""The loss on general text: what a training has cost the base beside its task."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.limits import Limits
from lowmem_reft.base.ours import ours
from lowmem_reft.data.general import encode_windows, read_general
from lowmem_reft.data.tokens import Collator
from lowmem_reft.machine.progress import progress
from lowmem_reft.methods.likelihood import check_finite, response_log_likelihood
from lowmem_reft.methods.virtual_tokens import num_virtual_tokens

if TYPE_CHECKING:
    from lowmem_reft.options import ForgettingOptions

Windows = list[dict[str, list[int]]]
"""What ``encode_windows`` returns."""


def windows_to_score(
    options: ForgettingOptions, tokenizer: Any, limits: Limits, *, task_type: str
) -> Windows:
    """Return the windows of the general text; none if it is not asked for.

    Raises:
        InputError: The text cannot be read, the base has no embedding for a token, or the model has
            no language model's head.
    """
    source = options.forgetting
    options.check_task(task_type)
    if source is None:
        return []
    windows = encode_windows(
        read_general(source),
        tokenizer,
        limit=options.forgetting_limit,
        num_positions=limits.num_positions,
    )
    limits.check([source] * len(windows), [window["input_ids"] for window in windows])
    return windows


@torch.no_grad()
def general_loss(
    model: Any, tokenizer: Any, windows: Windows, *, batch_size: int, source: str, quiet: bool
) -> float:
    r"""Return the mean negative log-likelihood of the windows' second halves, nats per token.

    With x a window, h the length of its first half and T its own:
    −Σ_{t ≥ h} log p(x_t | x_{<t}) over all windows, divided by the number of these tokens.

    The adapter of ``model`` acts as it does at inference, where the first half would be the prompt
    and the second half what comes next: ReFT edits its positions of the prompt (``f7+l7``: the
    first and the last seven tokens of the first half), and scored tokens only if they have a
    ``response``; virtual tokens stand before the prompt, and LoRA and all others that change
    weights act on every token. An edit of the prompt reaches the scored tokens through attention
    alone, more those that follow at once than later ones: the figure is that of a continuation as
    long as half a window.

    Args:
        model: Causal, with or without an adapter.
        tokenizer: The base's.
        windows: What ``encode_windows`` returns.
        batch_size: Windows per forward pass.
        source: The text, as it is named to the user.
        quiet: No progress bar.

    Raises:
        InputError: A window does not fit beside virtual tokens, or its likelihood is no number.
    """
    model.eval()
    ids = [window["input_ids"] for window in windows]
    virtual = num_virtual_tokens(model)
    Limits.of(model, tokenizer).check([source] * len(ids), ids, virtual=virtual)
    residency = ours(base_of(model)).residency
    collate, total, count = Collator(tokenizer, padding_side="left"), 0.0, 0
    with nullcontext() if residency is None else residency.streaming():
        starts = range(0, len(windows), batch_size)
        for start in progress(starts, "scoring general text", quiet=quiet):
            batch = collate(windows[start : start + batch_size])
            sums, counts = response_log_likelihood(model, batch)
            check_finite(sums.tolist(), source)
            total, count = total - float(sums.double().sum()), count + sum(counts)
    return total / count
