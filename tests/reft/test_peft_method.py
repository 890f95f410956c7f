"""What transformers' own ``add_adapter`` and ``load_adapter`` say of what they cannot do."""

from __future__ import annotations

import copy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations import peft as integration
from transformers.utils import check_peft_version

from lowmem_reft import InputError, ReftConfig
from lowmem_reft.methods.weights import WeightsConfig
from lowmem_reft.reft.lora_reft import LoraReftConfig
from lowmem_reft.reft.peft_method import explain_peft_check, refuse_partial_adapters

IS_REFUSED = Version(version("peft")) < Version(integration.MIN_PEFT_VERSION)
CALLS = {
    "add_adapter": (ReftConfig(task_type="CAUSAL_LM", rank=2),),
    "set_adapter": ("default",),
    "disable_adapters": (),
    "delete_adapter": ("default",),
}


@pytest.fixture
def transformers_own(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that makes the check, as transformers has it."""
    monkeypatch.setattr(integration, "check_peft_version", check_peft_version)
    return integration


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_hidden_layers=2, **sizes))


@pytest.mark.parametrize("call", CALLS)
def test_a_peft_that_transformers_refuses_is_an_input_error_that_says_what_to_do(
    call: str, base: Any, transformers_own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_own, "MIN_PEFT_VERSION", "99.0.0")
    explain_peft_check()
    with pytest.raises(InputError) as raised:
        getattr(base, call)(*CALLS[call])
    said = str(raised.value)
    major, minor = version("transformers").split(".")[:2]
    assert said.startswith("peft must be 99.0.0 or newer")
    assert f"transformers {version('transformers')}, got {version('peft')!r}" in said
    assert "get_peft_model" in said
    assert "PeftModel.from_pretrained" in said
    assert said.endswith(f"install peft>=99.0.0 if it is out, else transformers<{major}.{minor}")


@pytest.mark.skipif(not IS_REFUSED, reason="transformers takes this peft")
def test_importing_the_package_is_enough_where_transformers_refuses_the_installed_peft(
    base: Any,
) -> None:
    with pytest.raises(InputError, match=rf"peft must be {integration.MIN_PEFT_VERSION} or newer"):
        base.add_adapter(*CALLS["add_adapter"])


def test_the_check_is_explained_once(
    transformers_own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_own, "MIN_PEFT_VERSION", "99.0.0")
    explain_peft_check()
    explained = transformers_own.check_peft_version
    explain_peft_check()
    assert transformers_own.check_peft_version is explained
    assert explained.__wrapped__ is check_peft_version


def test_a_check_that_passes_is_left_alone(
    transformers_own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_own, "MIN_PEFT_VERSION", version("peft"))
    explain_peft_check()
    assert transformers_own.check_peft_version is check_peft_version


@pytest.mark.parametrize("name", ["check_peft_version", "MIN_PEFT_VERSION"])
def test_a_transformers_without_the_check_is_left_alone(
    name: str, transformers_own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(transformers_own, name)
    explain_peft_check()
    assert not hasattr(transformers_own, name)


SAVED = {
    "reft": ReftConfig(task_type="CAUSAL_LM", rank=2, init="paper"),
    "lora": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    "dora": LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, use_dora=True),
    "lora and reft": LoraReftConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, reft={"rank": 2, "init": "paper"}
    ),
    "weights": WeightsConfig(part="all"),
}


@pytest.mark.parametrize("kind", SAVED)
def test_an_adapter_that_transformers_loads_answers_as_through_peft_or_is_refused(
    kind: str, base: Any, tmp_path: Path
) -> None:
    saved = get_peft_model(copy.deepcopy(base), SAVED[kind])
    saved.save_pretrained(str(tmp_path))
    ids = torch.tensor([[3, 4, 5, 6]])
    model = copy.deepcopy(base)
    if kind in ("reft", "lora"):
        model.load_adapter(str(tmp_path))
        assert torch.equal(model.eval()(ids).logits, saved.eval()(ids).logits)
    else:
        with pytest.raises(InputError, match=r"use PeftModel\.from_pretrained\(model, directory"):
            model.load_adapter(str(tmp_path))


def test_an_adapter_without_some_of_its_tensors_is_refused_by_transformers_too(
    base: Any, tmp_path: Path
) -> None:
    get_peft_model(copy.deepcopy(base), SAVED["lora"]).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"without 1 of them, model\.layers\.0.*half loaded"):
        copy.deepcopy(base).load_adapter(str(tmp_path))
    refuse_partial_adapters()
    assert not hasattr(integration.PeftAdapterMixin.load_adapter.__wrapped__, "__wrapped__")


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_weights_come_back_whatever_the_adapter_is_called(
    tmp_path: Path, name: str
) -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0,
    )  # fmt: skip
    reft = ReftConfig(task_type="CAUSAL_LM", rank=2, positions="all")
    model = get_peft_model(LlamaForCausalLM(config), reft, adapter_name=name)
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "attention_mask": [1, 1, 1]}] * 2
    losses = iter([3.0, 1.0, 2.0])
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        learning_rate=0.1,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="chosen",
        greater_is_better=False,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda _: {"chosen": next(losses)},
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    saved = tmp_path / "checkpoint-2" / ("" if name == "default" else name)
    best = load_file(saved / "adapter_model.safetensors")
    found = get_peft_model_state_dict(model, adapter_name=name)
    assert best.keys() == found.keys()
    assert all(torch.equal(best[key], found[key]) for key in best)
