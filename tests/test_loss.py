"""The head on supervised tokens only against cross-entropy on the full logits in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lowmem_reft.config import ReftConfig
from lowmem_reft.loss import supervised_head_arguments

VOCAB_SIZE = 128


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCAB_SIZE, (3, 20))
    labels = ids.clone()
    labels[0, :15] = labels[1, :17] = labels[2, :12] = -100
    labels[2, 14:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted(directory: Path, method: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = (
        ReftConfig(task_type="CAUSAL_LM", positions="f2+l2", init="paper")
        if method == "reft"
        else LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    )
    return get_peft_model(AutoModelForCausalLM.from_pretrained(directory), config)


def gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("method", ["reft", "lora"])
@pytest.mark.parametrize("num_items", [None, 40])
def test_loss_and_gradients_are_those_of_the_full_logits(
    tiny_llama_dir: Path, batch: dict[str, torch.Tensor], method: str, num_items: int | None
) -> None:
    model = adapted(tiny_llama_dir, method)
    extra = {} if num_items is None else {"num_items_in_batch": torch.tensor(num_items)}
    short = model(**batch, **extra, **supervised_head_arguments(model, batch["labels"]))
    short.loss.backward()
    found = gradients(model)
    model.zero_grad()
    logits = model(**batch).logits.double()
    targets = batch["labels"][:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets, ignore_index=-100, reduction="sum"
    )
    wanted = total / (num_items or (targets != -100).sum())
    wanted.backward()
    torch.testing.assert_close(short.loss.double(), wanted, rtol=1e-6, atol=0)
    assert (found - gradients(model)).norm() <= 1e-5 * gradients(model).norm()


def test_no_logits_are_formed_for_positions_that_no_example_supervises(
    tiny_llama_dir: Path, batch: dict[str, torch.Tensor]
) -> None:
    model = adapted(tiny_llama_dir, "reft")
    shapes = []
    head = model.get_base_model().lm_head
    head.register_forward_hook(lambda module, args, output: shapes.append(tuple(output.shape)))
    model(**batch, **supervised_head_arguments(model, batch["labels"]))
    # Positions 11, 12 and 14 to 18 stand before a supervised token of some example.
    assert shapes == [(3, 7, VOCAB_SIZE)]


def test_a_model_with_a_loss_of_its_own_gets_nothing(
    tiny_llama_dir: Path, batch: dict[str, torch.Tensor]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    model.loss_function = lambda *args, **kwargs: torch.tensor(0.0)
    assert supervised_head_arguments(model, batch["labels"]) == {}
