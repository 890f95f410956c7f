"""Configurations of well-known models by short name, so that ``plan`` needs no hub and no files.

Written by hand from the models' public descriptions; only what sizes and operators depend on.
"""

from __future__ import annotations

import difflib
from typing import Any

import transformers

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
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def _shape(
    family: dict[str, Any], hidden: int, inner: int, layers: int, heads: int, **more: Any
) -> dict[str, Any]:
    return {
        **family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": False,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _shape(_LLAMA3, 2048, 8192, 16, 32, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _shape(_LLAMA3, 3072, 8192, 28, 24, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": _shape(_LLAMA3, 4096, 14336, 32, 32, head_dim=128),
    "llama-3.3-70b": _shape(_LLAMA3, 8192, 28672, 80, 64, head_dim=128),
    "qwen3-4b": _shape(_QWEN3, 2560, 9728, 36, 32, tie_word_embeddings=True),
    "qwen3-8b": _shape(_QWEN3, 4096, 12288, 36, 32),
    "qwen3-14b": _shape(_QWEN3, 5120, 17408, 40, 40),
    "qwen3-32b": _shape(_QWEN3, 5120, 25600, 64, 64),
}
"""Short name to the fields of the model's configuration."""

HUB_IDS = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.3-70b": "meta-llama/Llama-3.3-70B-Instruct",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
}
"""Short name to what ``train`` is given: the model's name on the hub."""


def config_of(name: str) -> Any | None:
    """Return the configuration that a short name stands for; None for any other name."""
    fields = SHAPES.get(name.lower())
    if fields is None:
        return None
    fields = dict(fields)
    return transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)


def short_name(model: str) -> str | None:
    """Return the short name of a hub id; None if it has none."""
    return next((name for name, hub_id in HUB_IDS.items() if hub_id == model), None)


def nearest_names(name: str) -> list[str]:
    """Return all short names, those that are most like ``name``, or its last part, first."""
    wanted = name.rpartition("/")[2].lower()

    def likeness(known: str) -> float:
        return difflib.SequenceMatcher(None, wanted, known).ratio()

    return sorted(SHAPES, key=likeness, reverse=True)
