"""Answers of adapters that were trained on choices: they end there, or it is said why not."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from lowmem_reft import cli
from lowmem_reft.methods.card import TrainingCard, load_card
from lowmem_reft.options import (
    DataOptions,
    DecodingOptions,
    EvaluateOptions,
    GenerateOptions,
    ModelOptions,
    ScoringOptions,
)
from lowmem_reft.runs import generate
from lowmem_reft.runs.chat import _Streamer
from lowmem_reft.runs.evaluate import run_evaluation
from lowmem_reft.runs.generate import continue_prompts, run_generation
from lowmem_reft.runs.resolve import resolve
from small_runs import small_run

PROMPT = "is the cat good or bad? label:"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "choices", "has_end"),
    [
        (
            [{"prompt": "a", "choices": [" good", "bad"], "answer": 0}] * 2,
            ["good", "bad"],
            False,
        ),
        (
            [
                {"prompt": "a", "choices": ["good", "bad"], "answer": 0},
                {"prompt": "a", "choices": ["cat", "dog"], "answer": 0},
            ],
            None,
            False,
        ),
        ([{"text": "a", "label": "bad"}, {"text": "b", "label": "good"}], ["bad", "good"], False),
        ([{"prompt": "a", "response": "good"}], None, True),
    ],
)
def test_the_card_remembers_what_all_rows_chose_among(
    tiny_llama_dir: Path, tmp_path: Path, rows: Any, choices: Any, has_end: bool
) -> None:
    options = small_run(tiny_llama_dir, tmp_path)
    card = resolve(replace(options, data=DataOptions(data=write(tmp_path / "a.jsonl", rows)))).card
    assert (card.choices, card.has_end) == (choices, has_end)
    card.save(tmp_path)
    assert load_card(tmp_path) == card


def adapter_of(base: Path, directory: Path, *, seed: int = 0, **card: Any) -> str:
    """Save an adapter of random values with a card of a training."""
    config = card.pop("config", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    model.save_pretrained(directory)
    fields = {"base": str(base), "storage": "fp32", "method": "lora", "data_digest": "d", **card}
    TrainingCard(**fields).save(directory)
    return str(directory)


def with_choices(adapter: str, choices: list[str] | None, **card: Any) -> None:
    known = load_card(Path(adapter))
    assert known is not None
    replace(known, choices=choices, **card).save(Path(adapter))


def asked(base: Path, adapter: str, **decoding: Any) -> GenerateOptions:
    return GenerateOptions(
        model=ModelOptions(model=str(base), device="cpu", storage="fp32", compute_dtype="fp32"),
        adapter=adapter,
        prompt=PROMPT,
        decoding=DecodingOptions(**{"max_new_tokens": 8, **decoding}),
    )


@pytest.fixture
def adapter(tiny_llama_dir: Path, tmp_path: Path) -> str:
    """An adapter whose answer has no end of its own."""
    return adapter_of(tiny_llama_dir, tmp_path / "one", seed=1, has_end=False)


def begun(base: Path, adapter: str) -> tuple[str, str]:
    """What an adapter answers with, in three tokens, and in eight."""
    short, whole = (
        str(
            run_generation(replace(asked(base, adapter, max_new_tokens=number), quiet=True))[
                "response"
            ]
        )
        for number in (3, 8)
    )
    assert short.strip()
    assert whole.startswith(short)
    assert whole.strip() != short.strip()
    return short.rstrip(), whole


@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_an_answer_that_is_a_choice_of_the_training_ends_there(
    tiny_llama_dir: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {}
    if kind == "prompt":
        config = {"config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    adapter = adapter_of(tiny_llama_dir, tmp_path / "one", has_end=False, **config)
    choice, whole = begun(tiny_llama_dir, adapter)
    with_choices(adapter, [choice.strip(), "zzz"])
    capsys.readouterr()
    result = run_generation(asked(tiny_llama_dir, adapter))
    assert result["response"] == choice
    assert result["num_new_tokens"] == 3
    assert "cut at" not in capsys.readouterr().err
    # Where --stop says what ends an answer, that alone does.
    stopped = run_generation(asked(tiny_llama_dir, adapter, stop=("never",)))
    assert stopped["response"] == whole
    assert "cut at" not in capsys.readouterr().err


def test_each_adapter_of_a_batch_ends_at_its_own_choices_and_the_base_at_none(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    names = ["one", "two"]
    given = [
        adapter_of(tiny_llama_dir, tmp_path / name, seed=seed)
        for seed, name in enumerate(names, start=1)
    ]
    expected = {}
    for name, adapter in zip(names, given, strict=True):
        expected[name], _ = begun(tiny_llama_dir, adapter)
        with_choices(adapter, [expected[name].strip(), "zzz"])
    options = asked(tiny_llama_dir, f"{given[0]},__base__,{given[1]}")
    expected["__base__"] = run_generation(replace(options, adapter=None))["response"]
    assert run_generation(options)["responses"] == expected


def test_what_follows_an_end_is_read_by_no_choice(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    ids, other = [20, tokenizer.eos_token_id], [21, 20, 22, 20, 21, 23]

    class Scripted(torch.nn.Module):
        step = -1

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.step += 1
            logits = torch.zeros(len(hidden), 1, model.config.vocab_size)
            for row, script in zip(logits, (ids, other), strict=True):
                row[0, script[self.step] if self.step < len(script) else 11] = 1.0
            return logits

    model.lm_head = Scripted()
    one, two = (tokenizer.decode([number]).strip() for number in (20, 22))
    longest = tokenizer.decode([21, 20, 22])
    answers = continue_prompts(
        model,
        tokenizer,
        [[5], [6]],
        DecodingOptions(max_new_tokens=8),
        ends=[tokenizer.eos_token_id],
        choices=[[one, one + two], [longest.strip(), two]],
    )
    assert [answer[:2] for answer in answers] == [(tokenizer.decode([20]), 2), (longest, 3)]
    assert not any(answer.is_cut for answer in answers)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ({"choices": ["zzz", "yyy"], "has_end": False}, "none of the training's choices ('zzz', "),
        ({"choices": None, "has_end": False}, "rows had choices, after which no end was trained"),
        ({"choices": None, "has_end": None}, "the adapter is of an earlier version; if its rows"),
        ({"choices": None, "has_end": True}, None),
        ({"choices": ["zzz", "yyy"], "has_end": True}, None),
        ({"choices": None, "has_end": None, "data_digest": None}, None),
    ],
)
def test_an_answer_that_is_cut_says_why_where_choices_are_the_reason(
    tiny_llama_dir: Path,
    adapter: str,
    card: Any,
    said: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_choices(adapter, **card)
    transformers_logging.disable_progress_bar()
    run_generation(asked(tiny_llama_dir, adapter))
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if "cut at max_new_tokens 8" in line]
    if said is None:
        assert not lines
    else:
        (line,) = lines
        assert line.startswith("one: 1 of 1 answers cut at max_new_tokens 8")
        assert said in line
        assert "--stop" in line
        assert "evaluate" in line
    run_generation(replace(asked(tiny_llama_dir, adapter), quiet=True))
    assert "cut at" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n" * 2))
    command = f"chat --model {tiny_llama_dir} --adapter {adapter} --device cpu --storage fp32"
    assert cli.main([*command.split(), "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().err.count("one: the answer was cut at") == (said is not None)


def test_an_answer_whose_end_was_trained_does_not_end_at_a_choice(
    tiny_llama_dir: Path, adapter: str
) -> None:
    choice, whole = begun(tiny_llama_dir, adapter)
    with_choices(adapter, choices=[choice.strip()], has_end=True)
    assert run_generation(asked(tiny_llama_dir, adapter))["response"] == whole


def test_a_choice_that_another_begins_with_is_an_answer_although_it_was_cut(
    tiny_llama_dir: Path, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    choice, _ = begun(tiny_llama_dir, adapter)
    with_choices(adapter, [choice.strip(), f"{choice.strip()}zzz"])
    capsys.readouterr()
    run_generation(asked(tiny_llama_dir, adapter, max_new_tokens=3))
    assert "cut at" not in capsys.readouterr().err


def test_a_conversation_shows_a_choice_and_ends_the_answer(
    tiny_llama_dir: Path,
    adapter: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice, whole = begun(tiny_llama_dir, adapter)
    base = run_generation(replace(asked(tiny_llama_dir, adapter), adapter=None))["response"]
    command = f"chat --model {tiny_llama_dir} --adapter {adapter} --device cpu --storage fp32"
    for choices, answer in (([choice.strip(), "zzz"], choice), (["zzz"], whole)):
        with_choices(adapter, choices)
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n/base\n"))
        assert cli.main([*command.split(), "--max-new-tokens", "8"]) == 0
        assert capsys.readouterr().out == f"{answer}\n{base}\n"


@pytest.mark.parametrize(
    ("choices", "text", "shown"),
    [
        (["a fox", "a dog"], "a fox", "a fox"),
        (["a fox the", "a fox"], "a fox is", "a fox"),
        (["a fox the", "a fox"], "a fox the", "a fox the"),
        (["the", "a fox is lazy"], "a fox the lazy dog", "a fox the lazy dog"),
    ],
)
def test_what_may_become_a_choice_is_not_shown_before_it_is_one_or_none(
    tiny_llama_dir: Path,
    choices: list[str],
    text: str,
    shown: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    streamer = _Streamer(tokenizer, [], (), choices)
    streamer.put(torch.tensor([1]))
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert (capsys.readouterr().out, streamer.visible) == (f"{shown}\n", shown)


@pytest.mark.parametrize("other", [False, True])
def test_generation_is_scored_with_answers_that_end_at_the_choices(
    tiny_llama_dir: Path, tmp_path: Path, adapter: str, other: bool, monkeypatch: Any
) -> None:
    with_choices(adapter, ["good", "bad"])
    rows = [{"prompt": PROMPT, "choices": ["good", "bad"], "answer": 1}]
    if other:
        rows = [{"prompt": PROMPT, "response": "a good film"}]
    seen: list[Any] = []
    whole = generate.continue_prompts

    def continued(*args: Any, **how: Any) -> Any:
        seen.append(how["choices"])
        return whole(*args, **how)

    monkeypatch.setattr(generate, "continue_prompts", continued)
    run_evaluation(
        EvaluateOptions(
            model=ModelOptions(model=str(tiny_llama_dir), device="cpu", storage="fp32"),
            adapter=Path(adapter),
            data=DataOptions(data=write(tmp_path / "rows.jsonl", rows)),
            scoring=ScoringOptions(scoring="generation", metric="exact_match", max_new_tokens=4),
            quiet=True,
        )
    )
    assert seen == [[()]] if other else [[["good", "bad"]]]
