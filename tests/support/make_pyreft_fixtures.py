"""Writes tests/support/pyreft: checkpoints that pyreft trained and saved, and its own logits.

Made with Python 3.11, pyreft 0.1.0, pyvene 0.1.8, transformers 4.45.1 and torch 2.13.0 (CPU), in an
environment of their own, by

    python tests/support/make_pyreft_fixtures.py tests/support/pyreft

``base`` is a random Llama of 3 blocks, width 16. Each other directory is one checkpoint: ten steps
of Adam by pyreft on blocks 0 and 2 (or on 1 alone), then ``save``; ``trainer`` is what its Trainer
writes, which has no config.json. ``cases.json`` says of each what pyreft does not write down:
positions, tying, activation. ``logits.safetensors`` has the input ids and pyreft's logits in fp32,
in evaluation mode, with the token positions of ``locations`` edited: one list per group.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import pyreft

LAYERS = (0, 2)
RANK = 3
LOCATIONS = {"tied": [[0, 1, 7, 8]], "sides": [[0, 1], [7, 8]]}  # f2+l2 on 9 tokens
CLASSES = {
    "loreft": pyreft.LoreftIntervention,
    "noreft": pyreft.NoreftIntervention,
    "direft": pyreft.DireftIntervention,
    "nodireft": pyreft.NodireftIntervention,
    "consreft": pyreft.ConsreftIntervention,
    "lobireft": pyreft.LobireftIntervention,
}
EXTRA: dict[str, dict[str, Any]] = {
    "loreft_relu": {"kind": "loreft", "act": "relu", "layers": (1,)},
    "loreft_paths": {"kind": "loreft", "component": "model.layers[{layer}].output"},
    "loreft_null_rank": {
        "kind": "loreft",
        "component": "mlp_output",
        "null_rank": True,
        "layers": (1,),
    },
    "direft_bf16": {"kind": "direft", "dtype": torch.bfloat16, "layers": (1,)},
    "noreft_bias": {"kind": "noreft", "add_bias": True, "layers": (1,)},
    "nodireft_bias": {"kind": "nodireft", "add_bias": True, "act": "gelu", "layers": (1,)},
    "classifier": {"kind": "loreft", "classes": 4, "layers": (1,)},
    "trainer": {"kind": "loreft", "save": "trainer"},
}


def write(directory: Path) -> None:
    """Replace ``directory`` by new fixtures."""
    shutil.rmtree(directory, ignore_errors=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # at the usual 0.02 so small a model hardly reacts to its input
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory / "base")
    tensors = {"input_ids": torch.randint(3, 24, (2, 9))}
    cases = {
        f"{kind}_{tie}": {"kind": kind, "tie": tie} for kind in CLASSES for tie in LOCATIONS
    } | EXTRA
    facts = {}
    for name, case in cases.items():
        tensors[name], facts[name] = make_case(directory, name, tensors["input_ids"], **case)
    save_file(tensors, directory / "logits.safetensors")
    (directory / "cases.json").write_text(json.dumps(facts, indent=1) + "\n")


def make_case(
    directory: Path,
    name: str,
    input_ids: torch.Tensor,
    *,
    kind: str,
    tie: str = "tied",
    act: str | None = None,
    component: str = "block_output",
    dtype: torch.dtype = torch.float32,
    null_rank: bool = False,
    add_bias: bool = False,
    classes: int = 0,
    save: str = "save",
    layers: tuple[int, ...] = LAYERS,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Train and save one checkpoint; return its logits and what it does not say of itself."""
    torch.manual_seed(1)
    auto = LlamaForSequenceClassification if classes else LlamaForCausalLM
    options = {"num_labels": classes} if classes else {}
    base = auto.from_pretrained(directory / "base", torch_dtype=torch.float32, **options)
    groups = LOCATIONS[tie]
    representations = [
        {
            "layer": layer,
            "component": component.format(layer=layer),
            **({} if null_rank else {"low_rank_dimension": RANK}),
            "intervention": CLASSES[kind](
                embed_dim=16, low_rank_dimension=RANK, dtype=dtype, act_fn=act, add_bias=add_bias
            ),
        }
        for _ in groups
        for layer in layers
    ]
    model = pyreft.get_reft_model(base, pyreft.ReftConfig(representations=representations))
    if classes:
        base.score.requires_grad_(True)
    locations = [[positions] * 2 for positions in groups for _ in layers]
    labels = torch.tensor([1, 3]) if classes else input_ids
    optimizer = torch.optim.Adam(model.get_trainable_parameters(), lr=0.05)
    for _ in range(10):
        optimizer.zero_grad()
        run(model, input_ids, locations, labels=labels).loss.backward()
        optimizer.step()
    target = directory / name
    if save == "trainer":
        model.save_intervention(str(target / "checkpoint-10" / "intervenable_model"))
    else:
        model.save(str(target), include_model=bool(classes))
    for intervention in model.interventions.values():
        intervention.float()  # what 16 bit holds is exact in fp32
    base.eval()
    with torch.no_grad():
        logits = run(model, input_ids, locations).logits
    return logits.contiguous(), {
        "class": CLASSES[kind].__name__,
        "positions": "f2+l2",
        "tie": tie,
        "act": act or "none",
        "locations": groups,
    }


def run(model: Any, input_ids: torch.Tensor, locations: list[Any], **labels: Any) -> Any:
    """Return the outputs of the adapted model."""
    return model(
        {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)},
        unit_locations={"sources->base": (None, locations)},
        **labels,
    )[1]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
