"""The measured optimizer step: one piece of code for our environment and for a peer's.

Imports nothing but torch and safetensors, which both have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.common import peak_rss_bytes, reset_peak_rss

if TYPE_CHECKING:
    from lowmem_reft.options import Storage

BATCH_FILE = "batch.safetensors"


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What one worker trains."""

    directory: str
    """Weights and batch, shared by all methods."""
    method: str
    """lora or loreft."""
    supervised_head: bool = False
    """Logits for supervised tokens only, as lowmem_reft's own training does for every method."""
    storage: Storage = "fp32"
    """How the frozen weights are stored."""
    compute_dtype: str = "fp32"
    """Arithmetic of the base."""
    rank: int
    """Rank of the update or of the intervention."""
    positions: str = "f7+l7"
    """Prompt tokens that LoReFT edits."""
    device: str = "cpu"
    """Where it runs."""


def load_batch(spec: StepSpec) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels`` (-100 on the prompt), each (batch, seq)."""
    batch = load_file(Path(spec.directory) / BATCH_FILE)
    return {name: tensor.to(spec.device) for name, tensor in batch.items()}


def base_facts(base: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
    """Loss and forward time of the untouched base: all methods must start from the same work."""
    base.train()  # in eval mode a 4-bit layer on the CPU repacks its weight for inference
    seconds = []
    with torch.no_grad():
        for _ in range(4):
            _synchronize(batch)
            started = time.perf_counter()
            loss = base(**batch).loss.item()
            seconds.append(time.perf_counter() - started)
    return {"base_loss": loss, "base_forward_s": min(seconds[1:])}


def training_step(
    forward: Callable[[], Any], parameters: Iterable[nn.Parameter], batch: dict[str, Tensor]
) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Facts about what is trained, and a sample: forward, backward, AdamW step and zero_grad.

    Args:
        forward: Runs the model on the batch and returns its output with ``loss`` and ``logits``.
        parameters: What is trained.
        batch: The batch, for its device.
    """
    trained = list(parameters)
    # No weight decay, as in the Trainer: in pyreft any decay turns the rotation to zero, because
    # torch truncates the diagonal of its parametrization to whole numbers.
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    reset_peak_rss()

    def sample() -> dict[str, Any]:
        _synchronize(batch)
        started = time.perf_counter()
        output = forward()
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(batch)
        seconds = time.perf_counter() - started
        logits = output.logits
        return {
            "seconds": seconds,
            "loss": output.loss.item(),
            "logits_shape": None if logits is None else list(logits.shape),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_allocated_bytes": _peak_allocated_bytes(batch),
        }

    facts = {
        "num_trainable_params": sum(p.numel() for p in trained),
        "num_threads": torch.get_num_threads(),
    }
    return facts, sample


def _on_cuda(batch: dict[str, Tensor]) -> bool:
    return batch["input_ids"].is_cuda


def _synchronize(batch: dict[str, Tensor]) -> None:
    if _on_cuda(batch):
        torch.cuda.synchronize()


def _peak_allocated_bytes(batch: dict[str, Tensor]) -> int | None:
    return torch.cuda.max_memory_allocated() if _on_cuda(batch) else None
