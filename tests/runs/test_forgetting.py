"""The loss on general text, against decoding it token by token and a cross-entropy in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_reft.base.blocks import base_of
from lowmem_reft.base.caches import cache_argument
from lowmem_reft.data.general import encode_windows
from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    BesideOptions,
    DataOptions,
    EvaluateOptions,
    ModelOptions,
)
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.runs.evaluate import run_evaluation
from lowmem_reft.runs.forgetting import general_loss

TEXT = "once upon a time there was a little cat. is the film good? the fox jumps over the dog. " * 9
METHODS = {
    "base": None,
    "loreft": ReftConfig(task_type="CAUSAL_LM", positions="f3+l3", init="paper"),
    "everywhere": ReftConfig(task_type="CAUSAL_LM", positions="all", init="paper"),
    "lora": LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def adapted(directory: Path, name: str) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    return (model if METHODS[name] is None else get_peft_model(model, METHODS[name])).eval()


@torch.no_grad()
def decoded(model: Any, window: list[int]) -> torch.Tensor:
    """Minus the log-likelihoods of a window's second half, as it is met at inference.

    The first half is read as a prompt, then one token after the other is given.
    """
    half = len(window) // 2
    ids = torch.tensor([window])
    found, past = [], None
    for end in range(half, len(window)):
        given = ids[:, :end] if past is None else ids[:, end - 1 : end]
        mask = torch.ones(1, end, dtype=torch.long)
        cache = {} if past is None else {cache_argument(base_of(model)): past}
        out = model(input_ids=given, attention_mask=mask, use_cache=True, **cache)
        past = out.past_key_values
        found.append(-out.logits[0, -1].double().log_softmax(-1)[ids[0, end]])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["base", "loreft", "everywhere", "lora"])
def test_the_loss_is_that_of_continuing_the_first_half(tiny_llama_dir: Path, name: str) -> None:
    model, tokenizer = (
        adapted(tiny_llama_dir, name),
        AutoTokenizer.from_pretrained(tiny_llama_dir),
    )
    windows = encode_windows(TEXT, tokenizer, limit=5, num_positions=64)
    wanted = torch.cat([decoded(model, window["input_ids"]) for window in windows]).mean()
    options = {"batch_size": 2, "source": "text", "quiet": True}
    assert general_loss(model, tokenizer, windows, **options) == pytest.approx(
        wanted.item(), rel=1e-6
    )
    plain = adapted(tiny_llama_dir, "base")
    ids = torch.tensor([window["input_ids"] for window in windows])
    half = ids.shape[1] // 2
    with torch.no_grad():
        logits = plain(input_ids=ids).logits.double()[:, half - 1 : -1]
    before = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, half:].flatten())
    assert (abs(before - wanted) < 1e-6) == (name == "base")
    assert general_loss(plain, tokenizer, windows, **options) == pytest.approx(
        before.item(), rel=1e-6
    )


def test_virtual_tokens_stand_before_the_window_and_must_fit_beside_it(
    tiny_llama_dir: Path,
) -> None:
    model, tokenizer = (
        adapted(tiny_llama_dir, "prompt"),
        AutoTokenizer.from_pretrained(tiny_llama_dir),
    )
    windows = encode_windows(TEXT, tokenizer, limit=2, num_positions=64)
    ids = torch.tensor([window["input_ids"] for window in windows])
    half = ids.shape[1] // 2
    with torch.no_grad():
        logits = model(input_ids=ids).logits.double()[:, 3 + half - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, half:].flatten())
    options = {"batch_size": 2, "source": "wiki.txt", "quiet": True}
    assert general_loss(model, tokenizer, windows, **options) == pytest.approx(
        wanted.item(), rel=1e-6
    )
    long = [{"input_ids": [5] * 254, "labels": [-100] * 127 + [5] * 127}]
    with pytest.raises(InputError, match=r"wiki.txt: tokens must fit the 256 positions .* virtual"):
        general_loss(model, tokenizer, long, **options)


@pytest.fixture
def evaluation(tiny_llama_dir: Path, films: Path, tmp_path: Path) -> EvaluateOptions:
    text = tmp_path / "wiki.txt"
    text.write_text(TEXT)
    return EvaluateOptions(
        model=ModelOptions(model=str(tiny_llama_dir), storage="fp32", device="cpu"),
        data=DataOptions(data=str(films)),
        beside=BesideOptions(forgetting=str(text), forgetting_limit=2),
        quiet=True,
    )


def test_evaluate_measures_the_base_and_the_adapter(
    evaluation: EvaluateOptions, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    model = adapted(tiny_llama_dir, "loreft")
    model.save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    windows = encode_windows(TEXT, tokenizer, limit=2, num_positions=256)
    options = {"batch_size": 8, "source": "text", "quiet": True}
    for adapter, loaded in (
        (None, adapted(tiny_llama_dir, "base")),
        (tmp_path / "adapter", model),
    ):
        found = run_evaluation(replace(evaluation, adapter=adapter))
        wanted = general_loss(loaded, tokenizer, windows, **options)
        assert found["general_loss"] == pytest.approx(wanted, rel=1e-6)
    assert "general_loss" not in run_evaluation(replace(evaluation, beside=BesideOptions()))


@pytest.mark.usefixtures("no_base")
def test_a_text_for_a_classifier_or_none_is_refused_before_the_base_is_loaded(
    evaluation: EvaluateOptions, tmp_path: Path
) -> None:
    rows = tmp_path / "labels.jsonl"
    lines = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    classifier = replace(
        evaluation,
        model=replace(evaluation.model, task_type="SEQ_CLS"),
        data=DataOptions(data=str(rows)),
    )
    message = "forgetting must be left out with task_type SEQ_CLS, got .*wiki.txt': a classif"
    with pytest.raises(InputError, match=message):
        run_evaluation(classifier)
    gone = BesideOptions(forgetting=str(tmp_path / "gone.txt"))
    with pytest.raises(InputError, match="forgetting must be an existing file"):
        run_evaluation(replace(evaluation, beside=gone))
