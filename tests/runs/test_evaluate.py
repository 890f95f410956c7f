"""Scoring against brute force, one sequence at a time in float64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lowmem_reft.data.rows import Row
from lowmem_reft.data.tasks.answers import extract_answer
from lowmem_reft.data.tokens import encode_choices
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.options import DataOptions, EvaluateOptions, ModelOptions, ReuseOptions
from lowmem_reft.reft.config import ReftConfig
from lowmem_reft.runs.evaluate import run_evaluation
from lowmem_reft.runs.score import ScoringSettings, score

ROWS = [
    Row(source=f"rows:{i}", prompt=prompt, choices=choices, answer=0, response=choices[0])
    for i, (prompt, choices) in enumerate(
        [
            ("is the film good or bad? label:", ("good", "bad", "lazy dog")),
            ("what is two and two?", ("four", "the quick brown fox")),
            ("once upon a time there was a little", ("cat", "answer", "film", "fox")),
        ]
    )
]


@pytest.fixture
def card(tiny_llama_dir: Path) -> TrainingCard:
    return TrainingCard(base=str(tiny_llama_dir), storage="fp32")


def load(directory: Path, *, adapted: bool) -> tuple[torch.nn.Module, object]:
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    if adapted:
        model = get_peft_model(
            model, ReftConfig(task_type="CAUSAL_LM", positions="f2+l3", init="paper")
        ).eval()
    return model, AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_likelihood_scores_equal_one_sequence_at_a_time(
    tiny_llama_dir: Path, card: TrainingCard, adapted: bool, batch_size: int
) -> None:
    model, tokenizer = load(tiny_llama_dir, adapted=adapted)
    scores = score(model, tokenizer, ROWS, card, ScoringSettings(batch_size=batch_size))
    for row, prediction, loss in zip(ROWS, scores.predictions, scores.losses, strict=True):
        totals = []
        for example in encode_choices(row, tokenizer).examples:
            ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                logits = model(input_ids=ids, labels=labels).logits.double().log_softmax(-1)
            wanted = labels[0, 1:] != -100
            picked = logits[0, :-1].gather(1, ids[0, 1:, None])[:, 0][wanted]
            totals.append(picked.sum().item())
        assert prediction == max(range(len(totals)), key=totals.__getitem__)
        assert loss == pytest.approx(-totals[0], rel=1e-5)


def test_padding_does_not_change_scores_of_a_model_with_absolute_positions(
    tiny_llama_dir: Path, card: TrainingCard
) -> None:
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    alone = score(model, tokenizer, ROWS, card, ScoringSettings(batch_size=1))
    together = score(model, tokenizer, ROWS, card, ScoringSettings(batch_size=16))
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    assert together.predictions == alone.predictions


def test_generated_answers_are_compared_after_extraction(
    tiny_llama_dir: Path, card: TrainingCard
) -> None:
    model, tokenizer = load(tiny_llama_dir, adapted=False)
    rows = [replace(row, choices=(), answer=None, response="so: 4") for row in ROWS]
    settings = ScoringSettings(answer_pattern=r"so: (\d)", max_new_tokens=3)
    assert len(score(model, tokenizer, rows, card, settings).correct) == 3
    with pytest.raises(InputError, match="rows:0: response must match answer_pattern"):
        score(model, tokenizer, rows, card, ScoringSettings(answer_pattern="never"))


class CountingTokenizer:
    """Passes everything on to a tokenizer and keeps the texts that it was called with."""

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer, self.texts = tokenizer, []

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: str | list[str], **options: object) -> object:
        self.texts += [texts] if isinstance(texts, str) else texts
        return self.tokenizer(texts, **options)


@pytest.mark.parametrize("scoring", ["likelihood", "generation"])
def test_cut_prompts_are_counted_as_they_are_scored_and_tokenized_once(
    tiny_llama_dir: Path, card: TrainingCard, scoring: str
) -> None:
    model, tokenizer = load(tiny_llama_dir, adapted=False)
    counting = CountingTokenizer(tokenizer)
    # The second prompt has room beside the right choice, not beside the longest one.
    rows = [
        replace(ROWS[0], prompt="a good film " * 9),
        replace(ROWS[1], prompt="a good film", choices=("four", "four" + " four" * 11)),
        ROWS[1],
    ]
    settings = ScoringSettings(scoring=scoring, max_new_tokens=1)
    scores = score(model, counting, rows, replace(card, max_length=40), settings)
    assert scores.num_cut_prompts == {"likelihood": 2, "generation": 1}[scoring]
    # Where answers are generated, once more with what is right, for the loss.
    assert counting.texts.count(rows[2].prompt) == {"likelihood": 1, "generation": 2}[scoring]


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("  The\nAnswer ", None, "the answer"),
        ("it is 3, no, 4.", r"(\d)", "4"),
        ("it is 3", r"is \d", "is 3"),
        ("nothing", r"(\d)", None),
    ],
)
def test_answers_are_extracted(text: str, pattern: str | None, answer: str | None) -> None:
    assert extract_answer(text, pattern) == answer


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(InputError, match="answer_pattern must be a regular expression"):
        extract_answer("a", "(")


def test_a_pattern_that_does_not_end_on_an_answer_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lowmem_reft.data.tasks.answers._PATTERN_SECONDS", 0.1)
    with pytest.raises(InputError, match=r"answer_pattern must match within .* on an answer of 41"):
        extract_answer("a" * 40 + "!", "(a+)+$")


@pytest.fixture
def adapter(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """An adapter with a training card, as train leaves it."""
    directory = tmp_path / "adapter"
    load(tiny_llama_dir, adapted=True)[0].save_pretrained(str(directory))
    TrainingCard(base=str(tiny_llama_dir), storage="fp32", max_length=200).save(directory)
    return directory


@pytest.fixture
def options(tiny_llama_dir: Path, adapter: Path, tmp_path: Path) -> EvaluateOptions:
    data = tmp_path / "rows.jsonl"
    row = {"prompt": "is the film good? " * 4, "choices": ["good", "bad"], "answer": 1}
    data.write_text(f"{json.dumps(row)}\n")
    return EvaluateOptions(
        model=ModelOptions(model=str(tiny_llama_dir), device="cpu"),
        data=DataOptions(data=str(data)),
        adapter=adapter,
        quiet=True,
    )


def test_a_given_max_length_is_honoured_although_the_adapter_has_one(
    options: EvaluateOptions,
) -> None:
    shorter = replace(options, data=replace(options.data, max_length=20))
    assert run_evaluation(options)["num_cut_prompts"] == 0
    assert run_evaluation(shorter)["num_cut_prompts"] == 1


@pytest.mark.usefixtures("no_base")
def test_a_task_type_that_contradicts_the_adapter_is_refused(options: EvaluateOptions) -> None:
    model = replace(options.model, task_type="SEQ_CLS")
    with pytest.raises(InputError, match="task_type must be CAUSAL_LM, which the adapter was"):
        run_evaluation(replace(options, model=model))


@pytest.mark.usefixtures("no_base")
def test_labels_that_the_adapter_does_not_know_are_refused(
    options: EvaluateOptions, card: TrainingCard, tmp_path: Path
) -> None:
    data = tmp_path / "labels.csv"
    data.write_text("text,label\nthe film,good\na fox,odd\n")
    labelled = replace(options, data=DataOptions(data=str(data)))
    for task_type in ("CAUSAL_LM", "SEQ_CLS"):
        names = ["bad", "good"]
        replace(card, task_type=task_type, label_names=names).save(tmp_path / "adapter")
        with pytest.raises(InputError, match=r"labels\.csv:3: label must be one of"):
            run_evaluation(labelled)
    with pytest.raises(InputError, match="a row must have text and label, got a choices row"):
        run_evaluation(options)


def test_predictions_are_written_one_line_per_example(tiny_llama_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "is it good?", "choices": ["good", "bad"], "answer": 1}\n' * 3)
    result = run_evaluation(
        EvaluateOptions(
            model=ModelOptions(model=str(tiny_llama_dir), device="cpu"),
            data=DataOptions(data=str(data)),
            predictions=tmp_path / "predictions.jsonl",
            quiet=True,
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert sum(line["correct"] for line in lines) / 3 == result["accuracy"] == result["value"]


def test_an_adapter_of_another_base_is_refused(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    other = get_peft_model(LlamaForCausalLM(config), ReftConfig(task_type="CAUSAL_LM"))
    other.save_pretrained(str(tmp_path / "adapter"))
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "is it good?", "choices": ["good", "bad"], "answer": 1}\n')
    with pytest.raises(InputError, match="adapter must fit the model"):
        run_evaluation(
            EvaluateOptions(
                model=ModelOptions(model=str(tiny_llama_dir), device="cpu"),
                data=DataOptions(data=str(data)),
                adapter=tmp_path / "adapter",
                quiet=True,
            )
        )


def test_reuse_that_scores_is_reported_and_reuse_without_effect_is_said(
    options: EvaluateOptions, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ReuseOptions(reuse="trunk", reuse_dir=tmp_path / "kept")
    plain, reused = run_evaluation(options), run_evaluation(replace(options, reuse=kept))
    assert "reuse" not in plain
    assert reused["reuse"] == "trunk"
    assert reused["store_bytes"] > 0
    assert reused["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert "no effect" not in caplog.text
    run_evaluation(replace(options, reuse=ReuseOptions(reuse="trunk")))
    assert "reuse trunk has no effect: it needs --reuse-dir" in caplog.text
