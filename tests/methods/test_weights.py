"""Training the base in place: what is saved, what is loaded, and what there is no way back from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

from lowmem_reft.errors import InputError
from lowmem_reft.methods.weights import WeightsConfig, trained_names

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llama(*, tied: bool = False, **sizes: int) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}, tie_word_embeddings=tied))


def config(part: str) -> WeightsConfig:
    return WeightsConfig(task_type="CAUSAL_LM", part=part)


@torch.no_grad()
def shift(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1


def test_a_shared_weight_is_saved_once_and_stays_shared(tmp_path: Path) -> None:
    model = get_peft_model(llama(tied=True), config("all"))
    shift(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.weight" not in saved
    assert sum(value.numel() for value in saved.values()) == model.num_parameters()
    loaded = PeftModel.from_pretrained(llama(tied=True), tmp_path).get_base_model()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, value in model.get_base_model().state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_the_head_alone_is_saved_and_merging_gives_the_trained_base(tmp_path: Path) -> None:
    base = llama()
    model = get_peft_model(base, config("head"))
    shift(model)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        "base_model.model.lm_head.weight"
    }
    assert model.merge_and_unload() is base


def test_biases_come_with_a_classifier_but_not_with_a_language_model() -> None:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    classifier = GPT2ForSequenceClassification(GPT2Config(**sizes))
    names = trained_names(classifier, "bias")
    assert names[-1] == "score.weight"
    assert all(name.endswith(".bias") for name in names[:-1])


def test_there_is_no_way_back_to_the_base() -> None:
    model = get_peft_model(llama(), config("all"))
    with pytest.raises(InputError, match=r"must stay on: .* overwritten"), model.disable_adapter():
        pass
    with pytest.raises(InputError, match="must stay on"):
        model.unload()
    with pytest.raises(InputError, match="must be alone, got default, other"):
        model.add_adapter("other", config("head"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_of_another_base_are_refused(tmp_path: Path) -> None:
    get_peft_model(llama(), config("all")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"9 trained weights .* do not match, for example"):
        PeftModel.from_pretrained(llama(num_hidden_layers=3), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    del weights["base_model.model.model.norm.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"1 trained weights .* for example model\.norm\.weight"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InputError, match="part must be one of all, bias, head, got 'tail'"):
        config("tail")
