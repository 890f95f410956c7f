"""Hybrids, mixtures and language models beside a vision tower: right on text, or refused in words.

What is asked of each: an adapter starts as the base and learns, a batch answers as each prompt
alone, and with a cache as without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor

from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.heads import auto_class, from_config
from lowmem_reft.base.loading import load_base
from lowmem_reft.base.loss import find_head, use_chunked_loss
from lowmem_reft.errors import InputError
from lowmem_reft.methods.attach import check_target_modules
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.options import MethodOptions
from lowmem_reft.reft.config import ReftConfig

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 200,  # larger than the text's blocks, and as many
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}


def text(kind: str, **more: Any) -> dict[str, Any]:
    return {**SIZES, "model_type": kind, **more}


KINDS: dict[str, dict[str, Any]] = {
    "bamba": {**SIZES, "attn_layer_indices": [1], "mamba_expand": 2, **MAMBA},
    "falcon_h1": {**SIZES, "mamba_d_ssm": 64, "mamba_n_groups": 1, **MAMBA},
    "granitemoehybrid": {
        **SIZES,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        **MAMBA,
    },
    "lfm2": {**SIZES, "layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 24, **LINEAR},
    "qwen3_5_text": {**SIZES, **LINEAR},
    "olmo_hybrid": {**SIZES, **LINEAR},
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "llava": {
        "text_config": text("llama"),
        "vision_config": {**VISION, "model_type": "clip_vision_model"},
        "image_token_index": 7,
    },
    "qwen2_vl": {
        "text_config": text("qwen2_vl_text", rope_parameters=MROPE),
        "vision_config": {"depth": 4, "embed_dim": 32, "num_heads": 2, "hidden_size": 32},
    },
    "qwen3_vl": {
        "text_config": text("qwen3_vl_text"),
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [1]},
    },
    "gemma3": {
        "text_config": text("gemma3_text", sliding_window=16),
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 7,
    },
    "mistral3": {
        "text_config": text("mistral"),
        "vision_config": {**VISION, "model_type": "pixtral"},
        "image_token_index": 7,
    },
    "idefics3": {"text_config": text("llama"), "vision_config": VISION, "image_token_id": 7},
    "internvl": {
        "text_config": text("qwen2"),
        "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": 7,
    },
}
PROMPTS = [[5, 9, 23, 40, 41, 60, 17, 31], [6, 27, 50]]


def config_of(kind: str, **fields: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **(fields or KINDS[kind]))


def padded(sequences: list[list[int]], fill: int = 0) -> Tensor:
    size = max(map(len, sequences))
    return torch.tensor([[fill] * (size - len(ids)) + ids for ids in sequences])


def batch_of(*prompts: list[int]) -> dict[str, Tensor]:
    mask = padded([[1] * len(ids) for ids in prompts])
    return {"input_ids": padded(list(prompts)), "attention_mask": mask}


def answers(model: Any, *prompts: list[int], **options: Any) -> list[list[int]]:
    new: Tensor = model.generate(
        **batch_of(*prompts), max_new_tokens=5, min_new_tokens=5, do_sample=False, **options
    )
    return new[:, max(map(len, prompts)) :].tolist()


def likelihoods(model: Any, *prompts: list[int]) -> list[float]:
    labels = padded([[-100] * (len(ids) - 2) + ids[-2:] for ids in prompts], fill=-100)
    return response_log_likelihood(model, {**batch_of(*prompts), "labels": labels})[0].tolist()


@pytest.mark.filterwarnings("ignore:.*fallback.*", "ignore:.*is falling back.*")
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_starts_as_the_base_learns_and_answers_alike_in_a_batch_and_without_a_cache(
    kind: str,
) -> None:
    base: Any = from_config(config_of(kind), "CAUSAL_LM").float().eval().requires_grad_(False)
    for parameter in base.parameters():
        parameter.mul_(4 if parameter.ndim > 1 else 1)
    with torch.no_grad():
        before = base(**batch_of(PROMPTS[0])).logits
    model: Any = get_peft_model(
        base, ReftConfig(task_type="CAUSAL_LM", rank=2, positions="f1+l1")
    ).eval()
    use_chunked_loss(model)
    assert "vision" not in find_blocks(base)[0]
    with torch.no_grad():
        assert torch.equal(model(**batch_of(PROMPTS[0])).logits, before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.2)
    inputs = batch_of(PROMPTS[0])
    labels = inputs["input_ids"].clone()
    labels[:, :4] = -100
    losses = []
    for _ in range(4):
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    alone = [answers(model.eval(), ids)[0] for ids in PROMPTS]
    assert answers(model, *PROMPTS) == alone
    assert answers(model, PROMPTS[0], use_cache=False) == alone[:1]
    each = [likelihoods(model, ids)[0] for ids in PROMPTS]
    assert likelihoods(model, *PROMPTS) == pytest.approx(each, abs=1e-4)


def test_a_factor_of_the_logits_that_a_backbone_holds_is_part_of_the_head() -> None:
    config = config_of("falcon_h1", **{**KINDS["falcon_h1"], "lm_head_multiplier": 0.25})
    head = find_head(from_config(config, "CAUSAL_LM").requires_grad_(False))
    assert head is not None
    assert head.scale == 0.25


@pytest.mark.parametrize("attention", ["flash_attention_2", "eagre", "../.."])
def test_an_attention_that_is_not_here_is_named_and_not_the_task(attention: str) -> None:
    with pytest.raises(InputError, match=f"^attn_implementation must be .* got '{attention}'"):
        from_config(transformers.LlamaConfig(), "CAUSAL_LM", attn_implementation=attention)


@pytest.mark.parametrize("kind", ["paligemma", "blip-2", "florence2", "kosmos-2"])
def test_models_that_are_not_right_on_text_alone_are_refused_in_words(kind: str) -> None:
    with pytest.raises(InputError, match=f"reads text alone, got {kind}, .* among aya_vision"):
        auto_class(transformers.AutoConfig.for_model(kind), "CAUSAL_LM")


def test_a_model_whose_answers_depend_on_the_padding_is_refused() -> None:
    with pytest.raises(InputError, match="passes over padding, got rwkv"):
        auto_class(transformers.RwkvConfig(), "CAUSAL_LM")


GEMMA3N = {
    **SIZES,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
}


def test_blocks_of_several_vectors_per_token_are_refused_for_edits_before_anything_is_loaded() -> (
    None
):
    config = config_of("gemma3n_text", **GEMMA3N)
    for name in ("loreft", "lora_reft"):
        with pytest.raises(InputError, match="method must edit no hidden vectors of gemma3n_text"):
            check_target_modules(MethodOptions(method=name), config, task_type="CAUSAL_LM")
    check_target_modules(MethodOptions(method="qlora"), config, task_type="CAUSAL_LM")


@pytest.mark.filterwarnings("ignore:.*keep full size")
@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        ("gemma3n_text", GEMMA3N, "prediction_coefs"),
        (
            "mamba",
            {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
            "dt_proj",
        ),
    ],
)
def test_weights_that_a_model_reads_as_numbers_are_not_quantized(
    kind: str, fields: dict[str, Any], name: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    from_config(config_of(kind, **fields), "CAUSAL_LM").save_pretrained(tmp_path)
    base: Any = load_base(tmp_path, storage="nf4", compute_dtype="fp32", device="cpu")
    found = [m for path, m in base.named_modules() if path.endswith(name)]
    assert found
    assert all(type(module) is torch.nn.Linear for module in found)
    assert any(type(module).__name__ == "Linear4bit" for module in base.modules())
    assert type(base.get_output_embeddings()) is torch.nn.Linear
    output = base.train()(**batch_of(PROMPTS[0]), labels=torch.tensor(PROMPTS[:1]))
    assert torch.isfinite(output.loss)
