"""One training step, the same on the meta device (``plan``) and on a real one (``profile``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.machine.marks import begins_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from lowmem_reft.memory.live import LiveMemory


def make_batch(
    batch_size: int, seq_len: int, response_len: int, *, padded: bool, vocab_size: int
) -> dict[str, Tensor]:
    """Return random tokens on the CPU: prompt, then ``response_len`` supervised ones.

    With ``padded`` the first example is shorter than the others by one token, so that the batch
    needs an attention mask.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each (batch, seq).
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (batch_size, seq_len), generator=generator)
    labels = ids.clone()
    labels[:, : seq_len - response_len] = IGNORED_LABEL
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -1], labels[0, -1] = 0, IGNORED_LABEL
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@begins_step
def training_step(
    model: nn.Module,
    batch: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    *,
    memory: LiveMemory | None = None,
    micro_batches: int = 1,
    max_grad_norm: float = 1.0,
    forward: Callable[[], Any] | None = None,
) -> None:
    """Run one optimizer step as the Trainer does, telling ``memory``, if it counts, the phase.

    The optimizer's state is there, as this is not the first step of a run. Each of the micro
    batches is the same one, and two show all there is to see. ``forward`` makes the forward pass
    instead of the model, for example from stored constants.
    """
    for _ in range(min(2, micro_batches)):
        if memory is not None:
            memory.phase = "forward"
        outputs = model(**batch) if forward is None else forward()
        loss = outputs.loss / micro_batches
        del outputs
        loss.backward()
        del loss
    if memory is not None:
        memory.phase = "optimizer"
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.nn.utils.clip_grad_norm_(trainable, max_grad_norm)
    optimizer.step()
    model.zero_grad()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the tensors of an optimizer's state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in values if isinstance(value, torch.Tensor)]


@begins_step
def warm_up(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer's state, as after the first step, without changing a parameter."""
    for group in optimizer.param_groups:
        group["lr"], group["saved_lr"] = 0.0, group["lr"]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = group.pop("saved_lr")
    model.zero_grad()
