"""The loss of what is right, against float64; a model that gives no numbers has no best answer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lowmem_reft.data.rows import Row
from lowmem_reft.data.tokens import encode_all_choices, encode_rows
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.runs.score import ScoringSettings, score

CHOICES = [
    Row(source=f"rows.jsonl:{number}", prompt="a", choices=("b", "c"), answer=0, response="b")
    for number in (1, 2)
]
LABELS = [Row(source="rows.jsonl:1", prompt="a", label="b")]
TARGETS = [Row(source="rows.jsonl:1", prompt="a", target=0.5)]
TEXTS = [
    Row(source=f"rows.jsonl:{number}", prompt=prompt, response=response)
    for number, (prompt, response) in enumerate(
        [("the quick", "brown fox"), ("a", "b"), ("is it good or bad", "it is " + "very " * 20)], 1
    )
]
ANSWERS = [Row(source="rows.jsonl:1", prompt="a", response="b c")]


def loss_per_token(model: Any, examples: list[dict[str, Any]]) -> float:
    """In float64, one example at a time, over all supervised tokens."""
    total, count = 0.0, 0
    for example in examples:
        ids, labels = (torch.tensor(example[name]) for name in ("input_ids", "labels"))
        logits = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        wanted = labels[1:] != -100
        total -= float(logits[wanted].gather(1, labels[1:][wanted][:, None]).sum())
        count += int(wanted.sum())
    return total / count


@pytest.mark.parametrize(
    ("rows", "options", "metric"),
    [
        (TEXTS, {}, "loss"),
        (TEXTS, {"scoring": "generation"}, "accuracy"),
        (TEXTS, {"metric": "loss", "extra_metrics": "overlap"}, "loss"),
        (TEXTS, {"metric": "exact_match"}, "exact_match"),
        (TEXTS, {"answer_pattern": "(.*)"}, "accuracy"),
        (CHOICES, {}, "accuracy"),
        (CHOICES, {"metric": "loss"}, "loss"),
        (CHOICES, {"scoring": "generation", "metric": "loss"}, "loss"),
    ],
)
@torch.no_grad()
def test_the_loss_is_that_of_all_supervised_tokens_however_rows_are_scored(
    tiny_llama_dir: Path, rows: list[Row], options: dict[str, Any], metric: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    card = TrainingCard(base="", storage="fp32", task_type="CAUSAL_LM", template="so {prompt}")
    settings = ScoringSettings(max_new_tokens=3, batch_size=2, **options)
    summary = score(model, tokenizer, rows, card, settings).summary()
    examples = encode_rows(rows, tokenizer, **card.prompts).examples
    expected = loss_per_token(model.double(), examples)
    assert summary["loss"] == pytest.approx(expected, rel=1e-5)
    assert summary["metric"] == metric
    assert summary["num_examples"] == len(rows)
    if metric == "loss":
        assert summary["value"] == summary["loss"]
    # Nothing is generated for the loss alone, and then no answer is right or wrong.
    asked = options.get("scoring") == "generation" or metric != "loss" or rows is CHOICES
    assert ("accuracy" in summary) == (asked or "extra_metrics" in options)


@torch.no_grad()
def test_a_reference_that_is_too_long_leaves_the_loss_unknown_unless_it_is_asked_for(
    tiny_llama_dir: Path,
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    card = TrainingCard(base="", storage="fp32", task_type="CAUSAL_LM", max_length=20)
    generated = ScoringSettings(scoring="generation", max_new_tokens=3)
    summary = score(model, tokenizer, TEXTS, card, generated).summary()
    assert (summary["accuracy"], "loss" in summary) == (0, False)
    with pytest.raises(InputError, match=r"rows\.jsonl:3"):
        score(model, tokenizer, TEXTS, card, ScoringSettings(metric="loss"))


@torch.no_grad()
def test_of_classes_the_loss_is_the_cross_entropy(tiny_llama_dir: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    rows = [Row(source=f"r:{n}", prompt="a b"[: n + 1], label="bc"[n % 2]) for n in range(3)]
    card = TrainingCard(base="", storage="fp32", task_type="SEQ_CLS", label_names=["b", "c"])
    scored = score(model, tokenizer, rows, card, ScoringSettings(metric="loss")).summary()
    total = 0.0
    for number, row in enumerate(rows):
        logits = model(**tokenizer(row.prompt, return_tensors="pt")).logits[0].double()
        total -= float(logits.log_softmax(-1)[number % 2])
    assert scored["value"] == scored["loss"] == pytest.approx(total / 3, rel=1e-5)
    assert scored["num_examples"] == 3


@torch.no_grad()
def test_classes_are_told_in_the_order_of_the_rows_and_padded_by_length(
    tiny_llama_dir: Path,
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama_dir, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    texts = ["a", "it is " + "very " * 9, "b", "so " * 12]
    rows = [Row(source=f"r:{n}", prompt=text, label="bc"[n % 2]) for n, text in enumerate(texts)]
    card = TrainingCard(base="", storage="fp32", task_type="SEQ_CLS", label_names=["b", "c"])
    widths: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: widths.append(args[0].shape[1])
    )
    scored = score(model, tokenizer, rows, card, ScoringSettings(metric="loss", batch_size=2))
    lengths = sorted(len(tokenizer(text)["input_ids"]) for text in texts)
    assert sorted(widths) == [lengths[1], lengths[3]]
    for number, text in enumerate(texts):
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0].double()
        assert scored.predictions[number] == int(logits.argmax())
        expected = -float(logits.log_softmax(-1)[number % 2])
        assert scored.losses[number] == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_choices_share_their_prompt_and_get_what_each_gets_alone(tiny_llama_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    rows = [
        Row(
            source=f"r:{n}",
            prompt="is it good or bad " * (n + 1),
            choices=("good", "bad", "neither of them"),
            answer=n % 3,
            response=("good", "bad", "neither of them")[n % 3],
        )
        for n in range(3)
    ]
    card = TrainingCard(base="", storage="fp32", task_type="CAUSAL_LM")
    read: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _, args, output: read.append(args[0].numel())
    )
    scored = score(model, tokenizer, rows, card, ScoringSettings(batch_size=1))
    handle.remove()
    encoded = encode_all_choices(rows, tokenizer, **card.prompts)
    whole = sum(len(e["input_ids"]) for by_choice in encoded for e in by_choice.examples)
    assert sum(read) < 0.7 * whole
    model.double()
    for number, by_choice in enumerate(encoded):
        losses = [loss_per_token(model, [example]) for example in by_choice.examples]
        counts = [sum(label != -100 for label in e["labels"]) for e in by_choice.examples]
        totals = [loss * count for loss, count in zip(losses, counts, strict=True)]
        assert scored.predictions[number] == totals.index(min(totals))
        assert scored.losses[number] == pytest.approx(totals[number % 3], rel=1e-5)
        assert scored.num_tokens[number] == counts[number % 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("rows", "card", "message"),
    [
        (CHOICES, {}, "rows.jsonl:1: log-likelihood must be a finite number, got nan"),
        (TEXTS[:1], {}, "rows.jsonl:1: log-likelihood must be a finite number, got nan"),
        (ANSWERS, {}, "model must give numbers to choose tokens by, got"),
        (LABELS, {"label_names": ["b", "c"]}, "rows.jsonl:1: logits must be a finite number, got"),
        (TARGETS, {"regression": True}, "rows.jsonl:1: logits must be a finite number, got"),
    ],
    ids=["choices", "texts", "answers", "classes", "numbers"],
)
def test_what_is_no_number_is_not_scored(
    tiny_llama_dir: Path, rows: list[Row], card: dict[str, Any], message: str, value: float
) -> None:
    kind, more = AutoModelForCausalLM, {"task_type": "CAUSAL_LM"}
    if card:
        kind, more = AutoModelForSequenceClassification, {"task_type": "SEQ_CLS"}
    count = {"num_labels": 1 if "regression" in card else 2} if card else {}
    model = kind.from_pretrained(tiny_llama_dir, **count)
    model.model.norm.weight.data[0] = value
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    told = TrainingCard(base="", storage="fp32", **more, **card)
    by = "generation" if rows is ANSWERS else "auto"
    with pytest.raises(InputError, match=message):
        score(model, tokenizer, rows, told, ScoringSettings(scoring=by))
