"""The base with solved examples before its prompts, against text that is put together by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    DataOptions,
    EvaluateOptions,
    HarnessOptions,
    ModelOptions,
    ScoredPromptOptions,
    ScoringOptions,
)
from lowmem_reft.runs import generate
from lowmem_reft.runs.evaluate import run_evaluation

CHOICES = ["good", "bad", "lazy dog"]
NOUNS = [("film", 0), ("quick brown fox", 1), ("little cat", 2), ("dog", 0), ("time", 1)]
RATED = [{"prompt": f"the {noun} is", "choices": CHOICES, "answer": a} for noun, a in NOUNS]
TEMPLATE = r"question: {prompt}\nlabel:"


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> EvaluateOptions:
    return EvaluateOptions(
        model=ModelOptions(model=str(tiny_llama_dir), storage="fp32", device="cpu"),
        data=DataOptions(data=write(tmp_path / "test.jsonl", RATED[:3]), template=TEMPLATE),
        prompts=ScoredPromptOptions(examples=write(tmp_path / "shown.jsonl", RATED[3:])),
        predictions=tmp_path / "predictions.jsonl",
        quiet=True,
    )


def changed(options: EvaluateOptions, **new: Any) -> EvaluateOptions:
    return EvaluateOptions(**{**vars(options), **new})


def test_choices_are_scored_after_the_examples_as_one_text(
    options: EvaluateOptions, tiny_llama_dir: Path
) -> None:
    scored = run_evaluation(options)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir).double()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)

    def tokens_of(text: str) -> list[int]:
        return list(tokenizer(text)["input_ids"])  # this one has no BOS

    shown = "question: the dog is\nlabel: good\n\nquestion: the time is\nlabel: bad\n\n"
    losses, num_tokens, right = [], 0, []
    for noun, answer in NOUNS[:3]:
        prompt = f"{shown}question: the {noun} is\nlabel:"
        start = tokens_of(prompt)
        totals = []
        for choice in CHOICES:
            rest = tokens_of(f"{prompt} {choice}")
            assert rest[: len(start)] == start
            with torch.no_grad():
                chances = model(torch.tensor([rest])).logits[0].log_softmax(-1)
            each = [chances[i - 1, rest[i]].item() for i in range(len(start), len(rest))]
            totals.append((sum(each), len(each)))
        losses.append(-totals[answer][0])
        num_tokens += totals[answer][1]
        right.append(max(range(3), key=lambda i: totals[i][0]) == answer)
    assert scored["loss"] == pytest.approx(sum(losses) / num_tokens, rel=1e-5)
    assert scored["value"] == pytest.approx(sum(right) / 3)
    places = [f"{options.prompts.examples}:{line}" for line in (1, 2)]
    assert scored["few_shot"] == {"shown": places, "num_short": 0, "fewest": 2}
    assert options.predictions is not None
    lines = [json.loads(line) for line in options.predictions.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [row["prompt"] for row in RATED[:3]]


def test_labels_become_choices_as_they_are_in_the_rows(
    options: EvaluateOptions, tmp_path: Path
) -> None:
    labels = [{"text": row["prompt"], "label": row["choices"][row["answer"]]} for row in RATED]
    names = sorted(CHOICES)
    chosen = [{**row, "choices": names, "answer": names.index(CHOICES[row["answer"]])}
              for row in RATED]  # fmt: skip
    found = []
    for kind, rows in (("labels", labels), ("choices", chosen)):
        own = {
            "data": DataOptions(data=write(tmp_path / f"{kind}.jsonl", rows[:3])),
            "prompts": ScoredPromptOptions(examples=write(tmp_path / f"{kind}-2.jsonl", rows[3:])),
        }
        found.append(run_evaluation(changed(options, **own))["loss"])
    assert found[0] == found[1]


def test_a_generated_answer_ends_where_the_next_example_would_begin(
    options: EvaluateOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"scoring": ScoringOptions(max_new_tokens=5, metric="exact_match")}
    rows = [{"prompt": row["prompt"], "response": "good"} for row in RATED]
    own = {
        "data": DataOptions(data=write(tmp_path / "a.jsonl", rows[:3]), template=TEMPLATE),
        "prompts": ScoredPromptOptions(examples=write(tmp_path / "b.jsonl", rows[3:])),
    }
    seen = []
    whole = generate.continue_prompts

    def continued(model: Any, tokenizer: Any, prompts: Any, decoding: Any, **how: Any) -> Any:
        seen.append((tokenizer.decode(prompts[0]), decoding.stop))
        return whole(model, tokenizer, prompts, decoding, **how)

    monkeypatch.setattr(generate, "continue_prompts", continued)
    assert run_evaluation(changed(options, **asked, **own))["num_examples"] == 3
    ((prompt, stop),) = seen
    assert stop == ("\n\n",)
    assert prompt.endswith("label: good\n\nquestion: the film is\nlabel:")
    assert generate.until_stop(" good\n\nquestion: the", stop) == " good"


def test_prompts_with_fewer_examples_are_counted_and_said(
    options: EvaluateOptions, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataOptions(data=options.data.data, template=TEMPLATE, max_length=45)
    found = run_evaluation(changed(options, data=data))
    assert found["few_shot"]["fewest"] < 2
    assert found["few_shot"]["num_short"] >= 1
    assert found["num_cut_prompts"] == 0
    said = f"{found['few_shot']['num_short']} of 3 prompts have fewer than the 2 examples before"
    assert said in caplog.text


def test_no_room_is_kept_for_new_tokens_where_none_are_generated(
    options: EvaluateOptions, tmp_path: Path
) -> None:
    rows = [{"prompt": f"the {noun} is", "response": "good"} for noun, _ in NOUNS]
    own = {
        "data": DataOptions(data=write(tmp_path / "a.jsonl", rows[:3])),
        "prompts": ScoredPromptOptions(examples=write(tmp_path / "b.jsonl", rows[3:])),
        "scoring": ScoringOptions(metric="loss", max_new_tokens=250),  # of 256 positions
    }
    found = run_evaluation(changed(options, **own))["few_shot"]
    assert (found["num_short"], found["fewest"]) == (0, len(rows) - 3)


@pytest.mark.parametrize("scoring", ["likelihood", "generation"])
def test_examples_that_the_base_has_no_positions_for_are_dropped_too(
    options: EvaluateOptions, tmp_path: Path, scoring: Any
) -> None:
    long = [{**row, "prompt": f"{row['prompt']} {'fox ' * 60}"} for row in RATED]  # of 256 tokens
    own = {
        "data": DataOptions(data=write(tmp_path / "a.jsonl", long[:3])),
        "prompts": ScoredPromptOptions(examples=write(tmp_path / "b.jsonl", long[3:])),
    }
    asked = ScoringOptions(scoring=scoring, max_new_tokens=4)
    found = run_evaluation(changed(options, scoring=asked, **own))["few_shot"]
    assert found["num_short"] == 3
    assert found["fewest"] < 2


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ({"adapter": Path("adapter")}, "examples must be left out with adapter, got"),
        (
            {"model": ModelOptions(model="m", task_type="SEQ_CLS")},
            "examples must be left out with task_type SEQ_CLS, got",
        ),
        (
            {"data": DataOptions(data=""), "harness": HarnessOptions(lm_eval="boolq")},
            "examples must be left out with lm_eval",
        ),
    ],
)
def test_where_there_is_no_place_for_examples_they_are_refused(
    options: EvaluateOptions, new: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        changed(options, **new)


def test_an_example_that_is_scored_too_is_refused(options: EvaluateOptions) -> None:
    prompts = ScoredPromptOptions(examples=options.data.data)
    with pytest.raises(InputError, match=r"test.jsonl:1: examples must hold no row that is scored"):
        run_evaluation(changed(options, prompts=prompts))
