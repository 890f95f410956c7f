"""Tokens that the base has no place for are refused before any work, wherever they come from."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lowmem_reft import cli
from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.data.tokens import Collator
from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    DataOptions,
    DecodingOptions,
    EvaluateOptions,
    GenerateOptions,
    HeldOutOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    ScoredDataOptions,
    ScoringOptions,
    TrainOptions,
)
from lowmem_reft.runs.evaluate import run_evaluation
from lowmem_reft.runs.generate import run_generation
from lowmem_reft.runs.train import run_training

FINE = {"prompt": "is the film good?", "response": "good"}
UNKNOWN = {"prompt": "use <tool> now", "response": "good"}
LONG = {"prompt": "the lazy dog " * 20, "response": "good"}
CHOICE = {"prompt": "is the film good?", "choices": ["good", "bad"], "answer": 0}

FEW = DecodingOptions(max_new_tokens=4)

NO_EMBEDDING = r"rows.jsonl:3: tokens must be among the 128 .* got '<tool>' with id 128"
NO_POSITION = r"rows.jsonl:3: tokens must fit the 32 positions of the base, got \d+"


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelOptions:
    """A base of 32 positions whose tokenizer has two tokens more than it: <tool> and the pad."""
    directory = tmp_path_factory.mktemp("limits") / "base"
    shutil.copytree(tiny_llama_dir, directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 32}))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(directory)
    return ModelOptions(model=str(directory), storage="fp32", device="cpu")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def train(base: ModelOptions, write: Callable[..., Path], tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        model=base,
        data=DataOptions(data=str(write(FINE, FINE, name="fine.jsonl"))),
        method=MethodOptions(rank=2, positions="l1"),
        optim=OptimOptions(max_steps=1, batch_size=2),
        run=RunOptions(output_dir=tmp_path / "run", quiet=True),
    )


def test_padding_that_the_base_has_no_embedding_for_is_done_with_a_token_that_it_has(
    base: ModelOptions, train: TrainOptions, write: Callable[..., Path]
) -> None:
    tokenizer = load_tokenizer(base.model)
    assert tokenizer.pad_token == "</s>"
    batch = Collator(tokenizer)([{"input_ids": [5]}, {"input_ids": [5, 6, 7]}])
    assert int(batch["input_ids"].max()) < 128
    unequal = write(FINE, {"prompt": "is it good or bad?", "response": "bad"})
    data = replace(train.data, data=str(unequal))
    assert run_training(replace(train, data=data))["num_steps"] == 1
    answers = run_generation(GenerateOptions(model=base, input=unequal, decoding=FEW, quiet=True))
    assert answers["num_examples"] == 2


@pytest.mark.parametrize(("row", "said"), [(UNKNOWN, NO_EMBEDDING), (LONG, NO_POSITION)])
@pytest.mark.usefixtures("no_base")
def test_training_rows_are_checked_before_the_base_is_loaded(
    train: TrainOptions, write: Callable[..., Path], row: dict[str, Any], said: str
) -> None:
    rows = str(write(FINE, FINE, row))
    chosen = {**CHOICE, "prompt": row["prompt"]}
    choices = str(write(CHOICE, CHOICE, chosen, name="chosen/rows.jsonl"))
    scored = replace(train, scoring=ScoringOptions(max_new_tokens=4))
    for options in (
        replace(train, data=replace(train.data, data=rows)),
        replace(scored, held_out=HeldOutOptions(validation_data=rows)),
        replace(scored, held_out=HeldOutOptions(eval_data=rows)),
        replace(train, held_out=HeldOutOptions(validation_data=choices)),
    ):
        with pytest.raises(InputError, match=said):
            run_training(options)


@pytest.mark.usefixtures("no_base")
def test_virtual_tokens_need_positions_too(train: TrainOptions) -> None:
    method = MethodOptions(method="prompt", num_virtual_tokens=30)
    with pytest.raises(InputError, match=r"fine.jsonl:1: .* 32 positions .* and 30 virtual ones"):
        run_training(replace(train, method=method))


@pytest.mark.parametrize(("row", "said"), [(UNKNOWN, NO_EMBEDDING), (LONG, NO_POSITION)])
def test_scored_rows_and_prompts_are_checked_before_the_first_forward_pass(
    base: ModelOptions, write: Callable[..., Path], row: dict[str, Any], said: str
) -> None:
    rows = write(FINE, FINE, row)
    scoring = ScoringOptions(max_new_tokens=4)
    data = ScoredDataOptions(data=str(rows))
    scored = EvaluateOptions(model=base, data=data, scoring=scoring)
    with pytest.raises(InputError, match=said):
        run_evaluation(scored)
    with pytest.raises(InputError, match=said):
        run_generation(GenerateOptions(model=base, input=rows, decoding=FEW, quiet=True))


def test_tokens_to_generate_need_positions(base: ModelOptions) -> None:
    said = r"--prompt: tokens must fit the 32 positions of the base, got 2 and 80 to generate"
    many = DecodingOptions(max_new_tokens=80)
    with pytest.raises(InputError, match=said):
        run_generation(GenerateOptions(model=base, prompt="the", decoding=many))


def test_a_conversation_is_cut_to_the_positions_that_the_answer_leaves(
    base: ModelOptions, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chat(message: str, *more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(message))
        arguments = ["chat", "--model", base.model, "--storage", "fp32", "--device", "cpu", *more]
        return cli.main(arguments), capsys.readouterr().err

    code, said = chat("use <tool> now\n", "--max-new-tokens", "4")
    assert code == 0
    assert "message: tokens must be among the 128" in said
    code, said = chat("the lazy dog\n", "--max-new-tokens", "4", "--max-length", "64")
    assert code == 0
    assert "conversations are cut to 29 tokens, not 64" in said
    code, said = chat("the lazy dog\n", "--max-new-tokens", "80")
    assert code == 2
    assert "max_new_tokens must leave room for a message in the base's 32 positions" in said
