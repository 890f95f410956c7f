"""Edits of the answer's tokens: what is trained with labels is what generation computes.

The reference is a float64 copy of the base without any adapter, whose blocks are edited by a hook
of a few lines, from one pass over all tokens so far.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, DynamicCache

import lowmem_reft as lr
from lowmem_reft import InputError
from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.caches import with_cache
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.reft.tuner import prompt_arguments
from tiny_models import ARCHITECTURES

KINDS = ("llama", "gpt2", "qwen3", "gemma")
SPECS = ("every", "l1+response", "f2+l2+response", "response")
LAYERS = (1, 3)
PROMPTS = ([11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24])
NEW = 5
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def adapt(kind: str = "llama", **fields: Any) -> tuple[Any, Any]:
    """Return a tiny model under a random adapter, and a float64 copy of its base alone."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **ARCHITECTURES[kind])
    config.initializer_range = 0.2
    base: Any = base_with_random_weights(
        config, device=torch.device("cpu"), storage="fp32", compute_dtype=torch.float32
    )
    exact = copy.deepcopy(base).double().eval()
    wanted = {"rank": 3, "layers": list(LAYERS), "positions": "every", **fields}
    model: Any = get_peft_model(base, lr.ReftConfig(task_type="CAUSAL_LM", **wanted))
    randomize(model)
    base.generation_config.pad_token_id = 0
    return model.eval(), exact


def randomize(model: Any, adapter: str = "default") -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if f".reft_phi.{adapter}." in name:
                tensor.normal_(0, 0.5)


def padded(rows: tuple[list[int], ...] = PROMPTS) -> dict[str, Tensor]:
    """Return prompts as generate takes them: padded on the left."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }


def edited(spec: str, num_prompt: int, num_response: int) -> list[bool]:
    """Return which tokens of one example are edited, written down part by part."""
    parts = ("all+response" if spec == "every" else spec).split("+")
    chosen = [False] * num_prompt
    for part in parts:
        if part == "all":
            chosen = [True] * num_prompt
        elif part[0] == "f":
            chosen[: int(part[1:])] = [True] * min(num_prompt, int(part[1:]))
        elif part[0] == "l":
            chosen[-int(part[1:]) :] = [True] * min(num_prompt, int(part[1:]))
    return chosen + ["response" in parts] * num_response


@torch.no_grad()
def reference(model: Any, exact: Any, ids: Tensor, mask: Tensor, chosen: Tensor) -> Tensor:
    """Return float64 logits of all tokens: h + Rᵀ(Wh + b − Rh) where ``chosen``, else h."""
    blocks, edits = find_blocks(exact)[1], []
    for layer in LAYERS:
        (phi,) = find_blocks(model.get_base_model())[1][layer].reft.reft_phi["default"]
        r, w, b = (t.double() for t in (phi.rotation(), phi.source.weight, phi.source.bias))

        def edit(_module: Any, _args: Any, output: Any, r: Any = r, w: Any = w, b: Any = b) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            new = torch.where(chosen[..., None], h + (h @ w.T + b - h @ r.T) @ r, h)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        edits.append(blocks[layer].register_forward_hook(edit))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    try:
        return exact(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    finally:
        for handle in edits:
            handle.remove()


def decoded(
    model: Any, exact: Any, spec: str, prompts: tuple[list[int], ...] = PROMPTS
) -> tuple[Tensor, Tensor]:
    """Return the sequences of greedy decoding by the reference, and the logits of each new token.

    Both are (batch, ...) and padded on the left; logits are (batch, new, vocab).
    """
    batch, found = padded(prompts), []
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for step in range(NEW):
        rows = [[False] * (ids.shape[1] - len(p) - step) + edited(spec, len(p), step) for p in prompts]
        logits = reference(model, exact, ids, mask, torch.tensor(rows))[:, -1]
        found.append(logits)
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return ids, torch.stack(found, 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", SPECS)
def test_decoding_gives_the_logits_of_the_reference_and_of_training(kind: str, spec: str) -> None:
    model, exact = adapt(kind, positions=spec)
    ids, logits = decoded(model, exact, spec)
    out = model.generate(**padded(), **GREEDY)
    assert torch.equal(out.sequences, ids)
    assert_close(torch.stack(out.logits, 1), logits)
    labels, mask = ids.clone(), padded()["attention_mask"]
    labels[:, :-NEW] = -100
    mask = torch.nn.functional.pad(mask, (0, NEW), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        forced = model(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
    assert_close(forced.logits[:, -NEW - 1 : -1], logits)
