"""Configurations of well-known models by short name, so that ``plan`` needs no hub and no files.

Written by hand from the models' public descriptions; only what sizes and operators depend on.
"""

from __future__ import annotations

import difflib
from typing import Any

import transformers

# Sizes, rotary embeddings and windows as litgpt (litgpt/config.py) and torchtune
# (torchtune/models/*/_model_builders.py) have copied them from the published configurations;
# whether embeddings are tied, from torchtune and from the published numbers of parameters, which
# tests count.
_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA32 = {
    **_LLAMA3,
    "rope_parameters": {**_LLAMA3["rope_parameters"], "factor": 32.0},  # type: ignore[dict-item]
    "tie_word_embeddings": True,
}
_QWEN25 = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
_QWEN25_TIED = {
    **_QWEN25,
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}
_QWEN3_TIED = {**_QWEN3, "tie_word_embeddings": True}
_MISTRAL = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "sliding_window": None,
}
_GEMMA2 = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49152,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}


def _shape(
    family: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, **more: Any
) -> dict[str, Any]:
    return {
        "tie_word_embeddings": False,
        **family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _shape(_LLAMA32, 2048, 8192, 16, 32, head_dim=64),
    "llama-3.2-3b": _shape(_LLAMA32, 3072, 8192, 28, 24, head_dim=128),
    "llama-3.1-8b": _shape(_LLAMA3, 4096, 14336, 32, 32, head_dim=128),
    "llama-3.3-70b": _shape(_LLAMA3, 8192, 28672, 80, 64, head_dim=128),
    "qwen2.5-0.5b": _shape(_QWEN25_TIED, 896, 4864, 24, 14),
    "qwen2.5-1.5b": _shape(_QWEN25_TIED, 1536, 8960, 28, 12),
    "qwen2.5-3b": _shape(_QWEN25_TIED, 2048, 11008, 36, 16),
    "qwen2.5-7b": _shape(_QWEN25, 3584, 18944, 28, 28, num_key_value_heads=4),
    "qwen2.5-14b": _shape(_QWEN25, 5120, 13824, 48, 40, num_key_value_heads=8),
    "qwen2.5-32b": _shape(_QWEN25, 5120, 27648, 64, 40, num_key_value_heads=8),
    "qwen2.5-72b": _shape(_QWEN25, 8192, 29568, 80, 64, num_key_value_heads=8),
    "qwen3-0.6b": _shape(_QWEN3_TIED, 1024, 3072, 28, 16),
    "qwen3-1.7b": _shape(_QWEN3_TIED, 2048, 6144, 28, 16),
    "qwen3-4b": _shape(_QWEN3_TIED, 2560, 9728, 36, 32),
    "qwen3-8b": _shape(_QWEN3, 4096, 12288, 36, 32),
    "qwen3-14b": _shape(_QWEN3, 5120, 17408, 40, 40),
    "qwen3-32b": _shape(_QWEN3, 5120, 25600, 64, 64),
    "mistral-7b-v0.3": _shape(_MISTRAL, 4096, 14336, 32, 32),
    "gemma-2-2b": _shape(_GEMMA2, 2304, 9216, 26, 8, num_key_value_heads=4),
    "gemma-2-9b": _shape(_GEMMA2, 3584, 14336, 42, 16, num_key_value_heads=8),
    "gemma-2-27b": _shape(
        *(_GEMMA2, 4608, 36864, 46, 32),
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=144,
    ),
    "smollm2-135m": _shape(_SMOLLM2, 576, 1536, 30, 9, num_key_value_heads=3),
    "smollm2-360m": _shape(_SMOLLM2, 960, 2560, 32, 15, num_key_value_heads=5),
    "smollm2-1.7b": _shape(
        *(_SMOLLM2, 2048, 8192, 24, 32),
        num_key_value_heads=32,
        rope_parameters={"rope_type": "default", "rope_theta": 130000.0},
    ),
}
"""Short name to the fields of the model's configuration."""

HUB_IDS = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5-72b": "Qwen/Qwen2.5-72B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "mistral-7b-v0.3": "mistralai/Mistral-7B-v0.3",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-27b": "google/gemma-2-27b",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}
"""Short name to what ``train`` is given: the model's name on the hub."""

_LONG = {"max_position_embeddings": 131072}
OTHER_IDS: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-3.2-1B-Instruct": ("llama-3.2-1b", {}),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama-3.2-3b", {}),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama-3.1-8b", {}),
    "meta-llama/Meta-Llama-3.1-8B": ("llama-3.1-8b", {}),
    "meta-llama/Meta-Llama-3.1-8B-Instruct": ("llama-3.1-8b", {}),
    "meta-llama/Llama-3.1-70B": ("llama-3.3-70b", {}),
    "meta-llama/Llama-3.1-70B-Instruct": ("llama-3.3-70b", {}),
    "meta-llama/Meta-Llama-3.1-70B": ("llama-3.3-70b", {}),
    "meta-llama/Meta-Llama-3.1-70B-Instruct": ("llama-3.3-70b", {}),
    "Qwen/Qwen2.5-0.5B": ("qwen2.5-0.5b", {}),
    "Qwen/Qwen2.5-1.5B": ("qwen2.5-1.5b", _LONG),
    "Qwen/Qwen2.5-3B": ("qwen2.5-3b", {}),
    "Qwen/Qwen2.5-7B": ("qwen2.5-7b", _LONG),
    "Qwen/Qwen2.5-14B": ("qwen2.5-14b", {**_LONG, "rms_norm_eps": 1e-5}),
    "Qwen/Qwen2.5-32B": ("qwen2.5-32b", {**_LONG, "rms_norm_eps": 1e-5}),
    "Qwen/Qwen2.5-72B": ("qwen2.5-72b", {**_LONG, "rms_norm_eps": 1e-5}),
    **{
        f"Qwen/Qwen3-{size}-Base": (f"qwen3-{size.lower()}", {"max_position_embeddings": 32768})
        for size in ("0.6B", "1.7B", "4B", "8B", "14B")
    },
    "mistralai/Mistral-7B-Instruct-v0.3": ("mistral-7b-v0.3", {}),
    **{f"google/gemma-2-{size}-it": (f"gemma-2-{size}", {}) for size in ("2b", "9b", "27b")},
    **{
        f"HuggingFaceTB/SmolLM2-{size}-Instruct": (f"smollm2-{size.lower()}", {})
        for size in ("135M", "360M", "1.7B")
    },
}
"""Other names on the hub to a short name, and what their configuration has otherwise."""


def config_of(name: str) -> Any | None:
    """Return the configuration that a short name stands for; None for any other name."""
    fields = SHAPES.get(name.lower())
    if fields is None:
        return None
    fields = dict(fields)
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


def config_of_hub_id(model: str) -> tuple[str, Any] | None:
    """Return the short name of the shape that a hub id has, and its configuration; None if none."""
    short, changes = OTHER_IDS.get(model, (None, {}))
    short = short or next((name for name, hub_id in HUB_IDS.items() if hub_id == model), None)
    if short is None:
        return None
    fields = {**SHAPES[short], **changes}
    return short, transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


def nearest_names(name: str) -> list[str]:
    """Return all short names, those that are most like ``name``, or its last part, first."""
    wanted = name.rpartition("/")[2].lower()

    def likeness(known: str) -> float:
        return difflib.SequenceMatcher(None, wanted, known).ratio()

    return sorted(SHAPES, key=likeness, reverse=True)
