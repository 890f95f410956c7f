"""Generation from files and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_reft.config import ReftConfig
from lowmem_reft.errors import InputError
from lowmem_reft.generate import generate_batches, run_generation
from lowmem_reft.options import GenerateOptions, ModelOptions
from lowmem_reft.training_card import TrainingCard


def test_batched_generation_equals_a_manual_greedy_loop_that_edits_the_prompt_only(
    tiny_llama_dir: Path,
) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama_dir),
        ReftConfig(task_type="CAUSAL_LM", positions="f1+l2", init="paper"),
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    prompts = [tokenizer(text)["input_ids"] for text in ("is it good?", "the lazy dog and a fox")]
    texts = generate_batches(model, tokenizer, prompts, batch_size=2, max_new_tokens=5)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = list(prompt)
        for _ in range(5):
            mask = torch.zeros(1, len(ids), dtype=torch.bool)
            mask[0, [0, len(prompt) - 2, len(prompt) - 1]] = True
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids]), intervention_mask=mask).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_a_file_of_prompts_becomes_a_file_of_responses(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "is it good?"}\n{"prompt": "the lazy dog"}\n{"prompt": "a"}\n')
    result = run_generation(
        GenerateOptions(
            model=ModelOptions(model=str(tiny_llama_dir), device="cpu"),
            input=source,
            output=output,
            max_new_tokens=4,
            batch_size=2,
            quiet=True,
        )
    )
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["is it good?", "the lazy dog", "a"]
    assert (result["num_examples"], result["num_cut_prompts"]) == (3, 0)


def test_prompts_that_are_cut_are_counted_and_said_once(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["a", "the lazy dog " * 9, "the quick fox " * 9]
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = GenerateOptions(
        model=ModelOptions(model=str(tiny_llama_dir), device="cpu"),
        input=source,
        output=output,
        max_length=16,
        max_new_tokens=2,
        quiet=True,
    )
    with pytest.warns(UserWarning, match="2 of 3 prompts had more than max_length 16") as said:
        result = run_generation(options)
    assert len(said) == 1
    assert result["num_cut_prompts"] == 2
    assert [json.loads(line)["prompt"] for line in output.read_text().splitlines()] == prompts
    assert run_generation(replace(options, max_length=None))["num_cut_prompts"] == 0


@pytest.mark.parametrize("trained", [False, True])
def test_a_classifier_does_not_generate(
    tiny_llama_dir: Path, tmp_path: Path, trained: bool
) -> None:
    model = ModelOptions(
        model=str(tiny_llama_dir), device="cpu", task_type=None if trained else "SEQ_CLS"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    TrainingCard(base=model.model, storage="nf4", task_type="SEQ_CLS").save(tmp_path)
    adapter = tmp_path if trained else None
    with pytest.raises(InputError, match="task_type must be CAUSAL_LM to generate, got 'SEQ_CLS'"):
        run_generation(GenerateOptions(model=model, adapter=adapter, prompt="a"))


@pytest.mark.parametrize("given", [{}, {"prompt": "a", "input": Path("b.jsonl")}])
def test_exactly_one_source_of_prompts_is_wanted(tiny_llama_dir: Path, given: dict) -> None:
    with pytest.raises(InputError, match="input must be given, or prompt"):
        run_generation(GenerateOptions(model=ModelOptions(model=str(tiny_llama_dir)), **given))
