"""A model that gives no numbers has no best answer: its scores are refused, with the row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from lowmem_reft.data.rows import Row
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.runs.score import ScoringSettings, score

CHOICES = [
    Row(source=f"rows.jsonl:{number}", prompt="a", choices=("b", "c"), answer=0, response="b")
    for number in (1, 2)
]
LABELS = [Row(source="rows.jsonl:1", prompt="a", label="b")]
TARGETS = [Row(source="rows.jsonl:1", prompt="a", target=0.5)]
ANSWERS = [Row(source="rows.jsonl:1", prompt="a", response="b c")]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("rows", "card", "message"),
    [
        (CHOICES, {}, "rows.jsonl:1: log-likelihood must be a finite number, got nan"),
        (ANSWERS, {}, "model must give numbers to choose tokens by, got"),
        (LABELS, {"label_names": ["b", "c"]}, "rows.jsonl:1: logits must be a finite number, got"),
        (TARGETS, {"regression": True}, "rows.jsonl:1: logits must be a finite number, got"),
    ],
    ids=["choices", "answers", "classes", "numbers"],
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
    with pytest.raises(InputError, match=message):
        score(model, tokenizer, rows, told, ScoringSettings())
