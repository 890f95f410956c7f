"""The child process of pyreft's own environment: pyreft's public interface, our timing.

Run by the benchmarks with the interpreter that ``--pyreft-python`` names. Weights are shared over
the positions (``share_weights``), as pyreft's commands for LoReFT with f7+l7 do: the cheaper of
its two forms.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.common import serve
from benchmarks.orthonormal_map import parametrized_map
from benchmarks.training_step import StepSpec, base_facts, load_batch, training_step


def prepare_step(spec: StepSpec) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """LoReFT by pyreft on every layer, trained on the shared batch."""
    import pyreft  # prints on import, which must not mix with the answers

    torch.manual_seed(0)
    batch = load_batch(spec)
    base: Any = AutoModelForCausalLM.from_pretrained(spec.directory, torch_dtype=torch.float32)
    base.to(spec.device)
    base.config.use_cache = False  # as on our base: no method pays for a cache that nobody reads
    facts = base_facts(base, batch)
    num_layers, hidden = base.config.num_hidden_layers, base.config.hidden_size
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": spec.rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=hidden, low_rank_dimension=spec.rank, dtype=torch.float32
            ),
        }
        for layer in range(num_layers)
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    model.model.train()
    locations = _locations(batch["labels"], spec.positions, num_layers)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def forward() -> Any:
        return model(
            inputs, unit_locations={"sources->base": (None, locations)}, labels=batch["labels"]
        )[1]

    trained = [p for p in model.parameters() if p.requires_grad]
    step_facts, sample = training_step(forward, trained, batch)
    return facts | step_facts, sample


def prepare_orthonormal(
    hidden: int, rank: int, method: str
) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """The rotation of pyreft's own LoReFT."""
    import pyreft

    del method  # pyreft has one
    torch.manual_seed(0)
    rotation: nn.Module = pyreft.LoreftIntervention(
        embed_dim=hidden, low_rank_dimension=rank
    ).rotate_layer
    return parametrized_map(rotation)


def _locations(labels: torch.Tensor, positions: str, num_layers: int) -> list[list[list[int]]]:
    """Edited token indices by (layer, example), by pyreft's own rule; no label means prompt."""
    from pyreft import get_intervention_locations

    by_example = [
        get_intervention_locations(
            last_position=int((row == -100).sum()),
            positions=positions,
            num_interventions=num_layers,
            share_weights=True,
        )
        for row in labels
    ]
    return [[example[layer] for example in by_example] for layer in range(num_layers)]


def main() -> None:
    """Prepare what the first argument describes, then answer the parent."""
    spec = json.loads(sys.argv[1])
    if spec.pop("kind") == "step":
        serve(lambda: prepare_step(StepSpec(**spec)))
    else:
        serve(lambda: prepare_orthonormal(**spec))


if __name__ == "__main__":
    main()
