"""The child process of our own environment: LoReFT, PEFT's LoRA, and our orthonormal map.

Run by the benchmarks: ``python -m benchmarks.worker '{"kind": "step", ...}'``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common import serve
from benchmarks.orthonormal_map import Rotation, orthonormal_map, parametrized_map
from benchmarks.training_step import StepSpec, base_facts, load_batch, training_step


def prepare_step(spec: StepSpec) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """A frozen base with one adapter, trained on the shared batch."""
    from peft import LoraConfig, PeftConfig, get_peft_model

    import lowmem_reft
    from lowmem_reft.base.loss import use_chunked_loss

    torch.manual_seed(0)
    batch = load_batch(spec)
    base = lowmem_reft.load_base(
        spec.directory, storage=spec.storage, compute_dtype=spec.compute_dtype, device=spec.device
    )
    facts = base_facts(base, batch)
    config: PeftConfig
    if spec.method == "lora":
        config = LoraConfig(task_type="CAUSAL_LM", r=spec.rank, target_modules="all-linear")
    else:
        config = lowmem_reft.ReftConfig(
            task_type="CAUSAL_LM",
            rank=spec.rank,
            layers="all",
            positions=spec.positions,
            tie="tied",
        )
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    if spec.supervised_head:
        use_chunked_loss(model)
    step_facts, sample = training_step(lambda: model(**batch), trained, batch)
    return facts | step_facts, sample


def prepare_orthonormal(
    hidden: int, rank: int, method: str
) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Our map, or torch's parametrization as pyreft uses it."""
    torch.manual_seed(0)
    if method == "torch":
        return parametrized_map(nn.utils.parametrizations.orthogonal(Rotation(hidden, rank)))
    from lowmem_reft.reft.rotation import orthonormal_rows

    raw = nn.Parameter(torch.randn(rank, hidden))
    return orthonormal_map(lambda: orthonormal_rows(raw), raw, [raw])


def main() -> None:
    """Prepare what the first argument describes, then answer the parent."""
    spec = json.loads(sys.argv[1])
    if spec.pop("kind") == "step":
        serve(lambda: prepare_step(StepSpec(**spec)))
    else:
        serve(lambda: prepare_orthonormal(**spec))


if __name__ == "__main__":
    main()
