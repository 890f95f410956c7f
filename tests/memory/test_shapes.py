"""Models that are known without network have the published sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowmem_reft.memory.shapes import (
    HUB_IDS,
    OTHER_IDS,
    SHAPES,
    config_of,
    config_of_hub_id,
    nearest_names,
)

# As they were published with the models.
NUM_PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "mistral-7b-v0.3": 7_248_023_552,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}


def with_layers(config: Any, number: int) -> int:
    """Parameters with fewer blocks, which are all alike."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = number
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:number]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_model_has_as_many_parameters_as_is_published(name: str) -> None:
    config = config_of(name)
    one, two = with_layers(config, 1), with_layers(config, 2)
    assert one + (config.num_hidden_layers - 1) * (two - one) == NUM_PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "factor"),
    [("llama-3.2-1b", 32.0), ("llama-3.2-3b", 32.0), ("llama-3.1-8b", 8.0), ("llama-3.3-70b", 8.0)],
)
def test_llamas_positions_are_scaled_by_the_factor_of_their_version(
    name: str, factor: float
) -> None:
    parameters = SHAPES[name]["rope_parameters"]
    assert parameters["factor"] == factor
    assert parameters["original_max_position_embeddings"] == 8192


@pytest.mark.parametrize(
    ("hub_id", "short", "positions"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", 131072),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b", 131072),
        ("meta-llama/Llama-3.1-70B", "llama-3.3-70b", 131072),
        ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b", 131072),
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b", 131072),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b", 32768),
        ("Qwen/Qwen2.5-3B", "qwen2.5-3b", 32768),
        ("Qwen/Qwen3-8B", "qwen3-8b", 40960),
        ("Qwen/Qwen3-8B-Base", "qwen3-8b", 32768),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3", 32768),
        ("google/gemma-2-2b-it", "gemma-2-2b", 8192),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", "smollm2-360m", 8192),
    ],
)
def test_hub_ids_of_one_shape_are_known_by_it(hub_id: str, short: str, positions: int) -> None:
    found = config_of_hub_id(hub_id)
    assert found is not None
    name, config = found
    assert (name, config.max_position_embeddings) == (short, positions)
    assert config.num_hidden_layers == SHAPES[short]["num_hidden_layers"]


def test_what_a_hub_id_changes_is_a_field_of_its_shape() -> None:
    assert not set(OTHER_IDS) & set(HUB_IDS.values())
    for short, changes in OTHER_IDS.values():
        assert set(changes) <= set(SHAPES[short])


def test_windows_are_those_of_the_models() -> None:
    assert config_of("mistral-7b-v0.3").sliding_window is None  # transformers' default is 4,096
    assert config_of("qwen2.5-7b").sliding_window is None
    kinds = config_of("gemma-2-2b").layer_types
    assert kinds == ["sliding_attention", "full_attention"] * 13


def test_other_names_are_unknown() -> None:
    assert config_of_hub_id("Qwen/Qwen3-9B") is None
    assert nearest_names("Qwen/Qwen2.5-7B-Chat")[0] == "qwen2.5-7b"
