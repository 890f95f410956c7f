"""An adapter is asked with its own tokenizer and chat template, where they lie beside it."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import TrainingCard, load_card
from lowmem_reft.methods.several import find_adapters, load_together
from lowmem_reft.methods.tokenizers import template_digest, vocabulary_digest, what_differs_in
from lowmem_reft.options import ModelOptions
from lowmem_reft.reft.config import ReftConfig

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def base(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_llama_dir, tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, name: str, *, tokens: list[str] | None = None, **card: Any) -> Path:
    """Save an adapter; with ``tokens`` also a tokenizer that has these besides, and a template."""
    directory = base.parent / name
    config = ReftConfig(task_type="CAUSAL_LM", positions="f1+l2", init="paper")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(directory))
    TrainingCard(base=str(base), storage="fp32", **card).save(directory)
    if tokens is not None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(tokens)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(directory)
    return directory


def loaded(base: Path, *adapters: Path | str) -> Any:
    options = ModelOptions(model=str(base), device="cpu", storage="fp32")
    given = ",".join(map(str, adapters))
    return load_together(options, find_adapters(given, options, template=None, max_length=None))[1]


@pytest.mark.parametrize("kept", ["all", "template", "settings"])
def test_the_tokenizer_and_the_template_beside_an_adapter_are_used_and_said(
    base: Path, caplog: pytest.LogCaptureFixture, kept: str
) -> None:
    one = adapter(base, "one", tokens=["<new>"])
    if kept != "all":
        (one / "tokenizer.json").unlink()
        (one / "tokenizer_config.json").unlink()
    if kept == "settings":
        (one / "chat_template.jinja").unlink()
        (one / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    tokenizer = loaded(base, one, "__base__")
    assert tokenizer.chat_template == TEMPLATE
    assert ("<new>" in tokenizer.get_vocab()) == (kept == "all")
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    wanted = "vocabulary and chat template" if kept == "all" else "another chat template"
    assert f"beside the adapter {one} is used" in said
    assert wanted in said


def test_a_tokenizer_beside_an_adapter_that_is_the_bases_is_not_worth_a_word(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = adapter(base, "one")
    AutoTokenizer.from_pretrained(base).save_pretrained(one)
    assert loaded(base, one).chat_template is None
    assert caplog.records == []


def test_a_base_without_a_tokenizer_is_asked_with_the_adapters(base: Path) -> None:
    one = adapter(base, "one", tokens=[])
    for file in base.glob("*token*"):
        file.unlink()
    assert loaded(base, one).chat_template == TEMPLATE
    with pytest.raises(InputError, match="model must have a tokenizer"):
        loaded(base, "__base__")


def test_adapters_with_different_tokenizers_are_refused_together(base: Path) -> None:
    one, two = adapter(base, "one", tokens=[]), adapter(base, "two", tokens=["<new>"])
    three = adapter(base, "three")
    assert loaded(base, one).chat_template == TEMPLATE
    with pytest.raises(InputError, match=r"with one tokenizer .* another vocabulary for 'two'"):
        loaded(base, one, two)
    with pytest.raises(InputError, match=r"another chat template for 'three' than for 'one'"):
        loaded(base, one, three)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_tokenizer_beside_an_adapter_that_cannot_be_read_is_refused(
    base: Path, file: str, content: str | bytes
) -> None:
    one = adapter(base, "one")
    (one / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"{one}.*save it again or delete it"):
        loaded(base, one)


def test_what_a_base_reads_otherwise_than_in_the_training_is_said(
    base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    card = {
        "vocabulary_digest": vocabulary_digest(tokenizer),
        "template_digest": template_digest(tokenizer),
    }
    one = adapter(base, "one", **card)
    loaded(base, one)
    assert caplog.records == []
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    loaded(base, one)
    assert f"the chat template of {base} is not the one that the adapter was trai" in caplog.text


def test_texts_that_are_cut_otherwise_are_another_vocabulary(base: Path) -> None:
    first, second = AutoTokenizer.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert what_differs_in(first, second) == ""
    second.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert what_differs_in(first, second) == "vocabulary"


def test_training_writes_down_what_its_prompts_were_read_with(base: Path) -> None:
    file = base.parent / "rows.jsonl"
    command = f"train --model {base} --device cpu --storage fp32 --max-steps 1 --quiet --data"
    chat = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "a dog"}]
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}a: {% endif %}"
    tokenizer.save_pretrained(base)
    rows = {"prompt": {"prompt": "a", "response": "b"}, "messages": {"messages": chat}}
    expected = {
        ("prompt",): ("chat", template_digest(tokenizer)),
        ("prompt", "--raw"): ("{prompt}", None),
        ("messages",): ("chat", template_digest(tokenizer)),
    }
    for (name, *flags), wanted in expected.items():
        file.write_text(json.dumps(rows[name]) + "\n")
        out = base.parent / "".join([name, *flags])
        assert cli.main([*command.split(), str(file), "--output-dir", str(out), *flags]) == 0
        card = load_card(out / "adapter")
        assert card is not None
        assert card.vocabulary_digest == vocabulary_digest(tokenizer)
        assert (card.template, card.template_digest) == wanted
