"""LoRA and ReFT together: one PEFT model whose halves come and go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

import lowmem_reft as lr
from lowmem_reft.errors import InputError
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.reft.layer import ReftLayer
from lowmem_reft.reft.lora_reft import LoraReftConfig

IDS = torch.arange(3, 23).view(2, 10)
LABELS = torch.where(torch.arange(10) < 6, -100, IDS)


@pytest.fixture
def base(tiny_llama_dir: Path) -> Any:
    return lr.load_base(tiny_llama_dir, storage="nf4", compute_dtype="fp32", device="cpu")


def config(**reft: Any) -> LoraReftConfig:
    return LoraReftConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj", "down_proj"],
        reft={"rank": 2, "positions": "f2+l2", "layers": "1;3", **reft},
    )


@torch.no_grad()
def randomize(model: Any, adapter: str = "default") -> None:
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.copy_(torch.randn_like(parameter) / 3)


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> Tensor:
    result: Tensor = model.eval()(input_ids=IDS, **arguments).logits
    return result


def test_both_halves_are_trained_and_each_changes_the_output(base: Any) -> None:
    model = get_peft_model(base, config())
    model.train()(input_ids=IDS, labels=LABELS).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".default.")[0].rpartition(".")[2] for name in trained} == {
        "lora_A",
        "lora_B",
        "reft_phi",
    }
    assert all(p.grad is not None for p in trained.values())
    untuned = logits(model)
    randomize(model)
    both = logits(model)
    for layer in (module for module in model.modules() if isinstance(module, ReftLayer)):
        layer.enable_adapters(False)
    lora_alone = logits(model)
    assert not torch.equal(both, lora_alone)
    assert not torch.equal(lora_alone, untuned)


def test_disabled_and_unloaded_the_base_is_as_it_was(base: Any) -> None:
    untuned = logits(base)
    model = get_peft_model(base, config())
    randomize(model)
    tuned = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), untuned)
    assert torch.equal(logits(model), tuned)
    bare = model.unload()
    assert torch.equal(logits(bare), untuned)
    assert not any(isinstance(module, ReftLayer) for module in bare.modules())


def test_two_adapters_are_switched_mixed_deleted_and_loaded_by_name(
    base: Any, tmp_path: Path
) -> None:
    untuned = logits(base)
    model = get_peft_model(base, config())
    model.add_adapter("other", config(layers="2", positions="all"))
    for adapter in ("default", "other"):
        randomize(model, adapter)
    first = logits(model)
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(first, second)
    mixed = logits(model, adapter_names=["other", "default"])
    torch.testing.assert_close(mixed, torch.stack([second[0], first[1]]))
    mixed = logits(model, adapter_names=["__base__", "other"])
    torch.testing.assert_close(mixed, torch.stack([untuned[0], second[1]]))
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(logits(model), first)
    model.load_adapter(tmp_path / "other", adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits(model), second)


def test_generation_edits_the_prompt_and_not_what_is_new(base: Any) -> None:
    model = get_peft_model(base, config(positions="l2"))
    randomize(model)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.eval().generate(input_ids=IDS, use_cache=True, **options)
    edited = torch.zeros_like(IDS, dtype=torch.bool)
    edited[:, -2:] = True
    ids = IDS
    for _ in range(4):
        with torch.no_grad():
            out = model(input_ids=ids, intervention_mask=edited).logits
        ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
        edited = torch.nn.functional.pad(edited, (0, 1))
    assert torch.equal(cached, ids)


def test_there_is_nothing_to_merge(base: Any) -> None:
    model = get_peft_model(base, config())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match="nothing to merge"):
            merge()


def test_the_saved_configuration_holds_both_and_is_checked(base: Any, tmp_path: Path) -> None:
    model = get_peft_model(base, config(dropout=0.1))
    randomize(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.peft_config["default"].reft_config() == ReftConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        rank=2,
        positions="f2+l2",
        layers="1;3",
        dropout=0.1,
    )
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(InputError, match="rank must be a whole number"):
        config(rank=0)
