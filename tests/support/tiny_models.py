"""Tiny models of several architectures, adapters on them and examples, for tests of reuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.base.synthetic import base_with_random_weights
from lowmem_reft.reft.config import ReftConfig

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 5,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NEOX = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
ARCHITECTURES = {
    "llama": SIZES,
    "qwen3": SIZES,
    "gemma": SIZES,
    "gemma2": SIZES,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
}


def make_model(
    architecture: str = "llama",
    storage: Any = "fp32",
    dtype: torch.dtype = torch.float32,
    peft_config: Any = None,
) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    base: Any = base_with_random_weights(
        config, device=torch.device("cpu"), storage=storage, compute_dtype=dtype
    )
    model: Any = get_peft_model(base, peft_config or reft("l1"))
    use_chunked_loss(model)
    return model.train()


def reft(positions: str, layers: str = "2;4") -> ReftConfig:
    return ReftConfig(
        task_type="CAUSAL_LM", rank=2, layers=layers, positions=positions, init="paper"
    )


def lora(layers: list[int]) -> LoraConfig:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules="all-linear", init_lora_weights=False
    )
    config.layers_to_transform = layers
    return config


def make_examples(count: int = 4) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    examples = []
    for number in range(count):
        prompt, response = 6 + 5 * (number % 4), 2 + number % 3
        ids = torch.randint(3, 256, (prompt + response,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return examples


def stacked(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    length = max(len(example["input_ids"]) for example in examples)

    def pad(values: list[int], fill: int) -> torch.Tensor:
        return torch.tensor(values + [fill] * (length - len(values)))

    return {
        "input_ids": torch.stack([pad(e["input_ids"], 0) for e in examples]),
        "attention_mask": torch.stack([pad([1] * len(e["input_ids"]), 0) for e in examples]),
        "labels": torch.stack([pad(e["labels"], -100) for e in examples]),
    }


def saved(directory: Path, architecture: str = "llama", **changes: Any) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory, max_shard_size="100KB")
    return directory


def adapted(base: Any, layers: str = "2;4", positions: str = "l1") -> Any:
    torch.manual_seed(0)
    config = ReftConfig(
        task_type="CAUSAL_LM", rank=2, layers=layers, positions=positions, init="paper"
    )
    model: Any = get_peft_model(base, config)
    use_chunked_loss(model)
    return model.train()
