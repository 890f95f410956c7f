"""Every answer of a conversation is trained and edited as it is given later on."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lowmem_reft import cli
from lowmem_reft.data.rows import load_rows
from lowmem_reft.data.tokens import encode_rows
from lowmem_reft.data.turns import of_turns
from lowmem_reft.methods.card import load_card
from lowmem_reft.methods.loading import load_adapted
from lowmem_reft.options import ModelOptions

NUM_NEW = 6
ASKED = ["was it the good film?", "why?", "and the other one?"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("multi-turn") / "base"
    shutil.copytree(tiny_llama_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """An adapter that was trained on every turn of three conversations, hard enough to differ."""
    chats = []
    for number in range(3):
        turns = [
            (f"{text} ({number})", f"answer {number}{turn}") for turn, text in enumerate(ASKED)
        ]
        messages = [
            {"role": role, "content": text}
            for pair in turns
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        chats.append(json.dumps({"messages": messages}) + "\n")
    data = base.parent / "chats.jsonl"
    data.write_text("".join(chats))
    run = base.parent / "run"
    flags = "--turns all --storage fp32 --positions f2+l3 --rank 2 --lr 0.05 --epochs 3 --quiet"
    files = ["--model", str(base), "--data", str(data), "--output-dir", str(run)]
    assert cli.main(["train", *files, *flags.split()]) == 0
    num_steps = json.loads((run / "result.json").read_text())["num_steps"]
    assert num_steps == 3 * -(-9 // 8)  # nine answers, not three
    return run / "adapter"


@pytest.fixture(scope="module")
def said(base: Path, adapter: Path) -> list[str]:
    """The answers of three turns in chat."""
    with pytest.MonkeyPatch.context() as patch:
        lines, output = io.StringIO("\n".join(ASKED) + "\n"), io.StringIO()
        patch.setattr("sys.stdin", lines)
        patch.setattr("sys.stdout", output)
        command = ["chat", "--model", str(base), "--adapter", str(adapter), "--quiet"]
        assert cli.main([*command, "--max-new-tokens", str(NUM_NEW)]) == 0
        return output.getvalue().split("\n")


def _conversation(base: Path, said: list[str]) -> list[dict[str, str]]:
    messages = []
    for asked, answer in zip(ASKED, said, strict=False):
        messages += [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": answer},
        ]
    return messages


@torch.no_grad()
def _answer_of_training(
    base: Path, adapter: Path, messages: list[dict[str, str]], *, edited: bool = True
) -> str:
    """Greedy, one whole pass a token, with the labels that a training example would have."""
    card = load_card(adapter)
    assert card is not None
    options = ModelOptions(model=str(base), device="cpu")
    model, tokenizer = load_adapted(options, adapter if edited else None, card)
    data = base.parent / "asked.jsonl"
    data.write_text(json.dumps({"messages": messages}) + "\n")
    *_, row = of_turns(load_rows(data), "all")
    (example,) = encode_rows([row], tokenizer).examples
    size = example["labels"].count(-100)
    ids = example["input_ids"][:size]
    new: list[int] = []
    while len(new) < NUM_NEW and new[-1:] != [tokenizer.eos_token_id]:
        labels = torch.tensor([[-100] * size + new])
        logits = model(input_ids=torch.tensor([ids + new]), labels=labels).logits
        new.append(int(logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True)


def test_the_third_answer_in_chat_is_that_of_a_pass_with_the_mask_of_training(
    base: Path, adapter: Path, said: list[str]
) -> None:
    messages = _conversation(base, said)
    assert len(messages) == 6
    messages[-1] = {"role": "assistant", "content": "any"}
    assert said[2] == _answer_of_training(base, adapter, messages)
    assert said[2] != _answer_of_training(base, adapter, messages, edited=False)


def test_the_third_answer_of_generate_is_that_of_a_pass_with_the_mask_of_training(
    base: Path, adapter: Path, said: list[str], tmp_path: Path
) -> None:
    messages, asked, output = _conversation(base, said), tmp_path / "in.jsonl", tmp_path / "out"
    asked.write_text(json.dumps({"messages": messages[:-1]}) + "\n")
    command = ["generate", "--model", str(base), "--adapter", str(adapter), "--quiet"]
    command += ["--input", str(asked), "--output", str(output)]
    assert cli.main([*command, "--max-new-tokens", str(NUM_NEW)]) == 0
    messages[-1] = {"role": "assistant", "content": "any"}
    answer: Any = json.loads(output.read_text())["response"]
    assert answer == _answer_of_training(base, adapter, messages)
