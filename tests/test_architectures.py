"""ReFT on every supported architecture, tiny and randomly initialised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import lowmem_reft as lr
from lowmem_reft.base import AUTO_CLASSES
from lowmem_reft.blocks import component_path, find_blocks

HIDDEN, NUM_LAYERS = 32, 2
COMMON = {
    "vocab_size": 64,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "gemma": lambda: transformers.GemmaConfig(**GEMMA),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GEMMA),
    "phi": lambda: transformers.PhiConfig(**COMMON),
    "phi3": lambda: transformers.Phi3Config(**GROUPED),
    "olmo2": lambda: transformers.Olmo2Config(**GROUPED),
    "glm4": lambda: transformers.Glm4Config(**GROUPED, head_dim=8),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "gpt2": lambda: transformers.GPT2Config(**COMMON),
    "bert": lambda: transformers.BertConfig(**COMMON),
    "roberta": lambda: transformers.RobertaConfig(**COMMON),
    "deberta": lambda: transformers.DebertaConfig(**COMMON, relative_attention=True),
    "deberta_v2": lambda: transformers.DebertaV2Config(**COMMON, relative_attention=True),
    "modernbert": lambda: transformers.ModernBertConfig(
        **COMMON, cls_token_id=1, sep_token_id=2, reference_compile=False
    ),
}
ENCODERS = ("bert", "roberta", "deberta", "deberta_v2", "modernbert")
DECODERS = tuple(name for name in CONFIGS if name not in ENCODERS)
CASES = [
    *((name, task) for name in DECODERS for task in AUTO_CLASSES),
    *((name, task) for name in ENCODERS for task in AUTO_CLASSES if task != "CAUSAL_LM"),
]
IDS = torch.tensor([[5, 9, 23, 40, 41, 60, 7, 31], [6, 17, 50, 12, 33, 52, 0, 0]])
MASK = (IDS != 0).long()


def tiny(name: str, task: str) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    try:
        model = AUTO_CLASSES[task].from_config(config, attn_implementation="eager")
    except ValueError as error:
        pytest.skip(f"transformers has none: {str(error)[:60]}")
    with torch.no_grad():  # at the usual 0.02 so small a model hardly reacts to its input
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model.requires_grad_(False).eval()


def reft_config(task: str, **fields: Any) -> lr.ReftConfig:
    return lr.ReftConfig(**{"task_type": task, "rank": 2, "positions": "f1+l1", **fields})


def output(model: Any, **arguments: Any) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=IDS, attention_mask=MASK, **arguments)
    return out.logits if "logits" in out else out.last_hidden_state


def loss_of(model: Any, task: str) -> Tensor:
    labels = {
        "CAUSAL_LM": IDS.masked_fill((torch.arange(8) < 4) | (MASK == 0), -100),
        "SEQ_CLS": torch.tensor([0, 2]),
        "TOKEN_CLS": (IDS % 3).masked_fill(MASK == 0, -100),
    }
    if task == "FEATURE_EXTRACTION":
        out = model(input_ids=IDS, attention_mask=MASK)
        return out.last_hidden_state.pow(2).mean()
    loss: Tensor = model(input_ids=IDS, attention_mask=MASK, labels=labels[task]).loss
    return loss


@pytest.mark.parametrize(("name", "task"), CASES)
def test_an_adapter_starts_as_the_base_learns_alone_and_survives_saving(
    name: str, task: str, tmp_path: Path
) -> None:
    base = tiny(name, task)
    untuned = output(base)
    original = {key: value.clone() for key, value in base.state_dict().items()}

    model = get_peft_model(base, reft_config(task)).eval()
    assert torch.equal(output(model), untuned)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):
        loss_of(model.train(), task).backward()
        adapter = [p for key, p in model.named_parameters() if ".reft_phi." in key]
        assert len(adapter) == 3 * NUM_LAYERS
        # The gradient of R vanishes where W = R and b = 0; from the second step on it does not.
        optimizer.step()
        optimizer.zero_grad()
    loss_of(model, task).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter)
    tuned = output(model.eval())
    assert not torch.equal(tuned, untuned)
    with model.disable_adapter():
        same_head = task not in ("SEQ_CLS", "TOKEN_CLS")
        assert torch.equal(output(model), untuned)
    after = {
        key.removeprefix("base_model.model."): value for key, value in model.state_dict().items()
    }
    for key, value in original.items():
        kept = after.get(key)
        if kept is None:  # the head, which PEFT wraps and trains
            assert not same_head
            module, _, tail = next(
                (m, ".", key[len(m) + 1 :]) for m in _prefixes(key) if f"{m}.original_module" in
                {".".join(k.split(".")[: m.count(".") + 2]) for k in after}
            )
            kept = after[f"{module}.original_module.{tail}"]
        assert torch.equal(kept, value), key

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(name, task), tmp_path)
    assert torch.equal(output(loaded), tuned)


def _prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]
