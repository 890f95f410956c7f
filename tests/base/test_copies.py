"""A base that was loaded, with all that hangs on it, copies and pickles as other models do."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lowmem_reft.base.loading import load_base
from lowmem_reft.base.loss import use_chunked_loss
from lowmem_reft.base.techniques import chunk_mlps, keep_embedding_on_host
from lowmem_reft.reft.config import ReftConfig

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
LABELS = torch.tensor([[-100, -100, -100, -100, 9, 10]])


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


def logits_and_loss(model: Any) -> tuple[torch.Tensor, float]:
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
    return logits, float(model.train()(input_ids=IDS, labels=LABELS).loss.detach())


def check(model: Any) -> None:
    logits, loss = logits_and_loss(model)
    for name, made in COPIES.items():
        other = made(model)
        same, same_loss = logits_and_loss(other)
        assert torch.equal(same, logits), name
        assert same_loss == loss, name
        with torch.no_grad():  # what hangs on the copy uses the copy's weights
            for parameter_name, parameter in other.named_parameters():
                if parameter.is_floating_point() and "reft" not in parameter_name:
                    parameter.zero_()
        zeroed, zeroed_loss = logits_and_loss(other)
        assert not torch.equal(zeroed, logits), name
        assert zeroed_loss != loss, name
        assert torch.equal(logits_and_loss(model)[0], logits), name


@pytest.mark.parametrize("storage", ["fp32", "nf4", "int8"])
def test_a_base_copies_and_pickles(tiny_llama_dir: Path, storage: Any) -> None:
    check(load_base(tiny_llama_dir, storage=storage, device="cpu", compute_dtype="fp32"))


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("method", ["reft", "lora"])
def test_an_adapter_on_a_base_copies_and_pickles(
    tiny_llama_dir: Path, storage: Any, method: str
) -> None:
    base: Any = load_base(
        tiny_llama_dir,
        storage=storage,
        device="cpu",
        compute_dtype="fp32",
        activation_checkpointing=True,
    )
    config: Any = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    if method == "reft":
        config = ReftConfig(task_type="CAUSAL_LM", rank=2, positions="f2+l2", init="paper")
    model = get_peft_model(base, config)
    use_chunked_loss(model)
    chunk_mlps(model, 2)
    keep_embedding_on_host(model)
    check(model)


@pytest.mark.parametrize("storage", ["fp32", "nf4"])
@pytest.mark.parametrize("how", COPIES)
def test_a_base_of_which_only_upper_blocks_are_there_copies_and_pickles(
    tiny_llama_dir: Path, storage: Any, how: str
) -> None:
    base: Any = load_base(
        tiny_llama_dir, storage=storage, device="cpu", resident="upper", first_resident=2
    )
    other = COPIES[how](base)
    assert other.residency.base is other
    with torch.no_grad(), base.residency.streaming(), other.residency.streaming():
        assert torch.equal(other(input_ids=IDS).logits, base(input_ids=IDS).logits)
    other.residency.restore()
    assert not any(parameter.is_meta for parameter in other.parameters())
    assert any(parameter.is_meta for parameter in base.parameters())
