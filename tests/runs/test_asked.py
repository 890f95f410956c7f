"""A model with a chat template is asked through it, and its adapters remember whether they were."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowmem_reft as lr
from lowmem_reft import cli
from lowmem_reft.compare.cells import build_cells
from lowmem_reft.compare.sources import find_sources
from lowmem_reft.data.rows import load_rows
from lowmem_reft.data.tokens import encode_all_choices, encode_rows
from lowmem_reft.errors import InputError
from lowmem_reft.memory.rows import longest_of, read_examples
from lowmem_reft.methods.card import load_card
from lowmem_reft.methods.entries import parse_methods
from lowmem_reft.options import CompareOptions, PlanOptions
from lowmem_reft.options.written import build, changed
from lowmem_reft.runs import generate
from written import json_lines

TEMPLATE = (
    "{% if messages[0].role != 'system' %}s: be good\n{% endif %}"
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
CHAT = "s: be good\nu: {prompt}</s>\na:"
"""What the template writes for a prompt."""
ROWS = [{"prompt": text, "response": "a dog"} for text in ("was it the good film?", "why?", "a")]
CHOICES = [{"prompt": text, "choices": ["good", "bad"], "answer": 0} for text in ("it is", "a")]
FLAGS = ["--device", "cpu", "--storage", "fp32", "--quiet"]


@pytest.fixture(scope="module")
def base(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("asked") / "base"
    shutil.copytree(tiny_llama_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    json_lines(directory.parent / "rows.jsonl", *ROWS)
    json_lines(directory.parent / "choices.jsonl", *CHOICES)
    return directory


def train(base: Path, name: str, *flags: str) -> Path:
    run = base.parent / name
    files = ["--model", str(base), "--data", str(base.parent / "rows.jsonl")]
    settings = ["--positions", "f2+l3", "--rank", "2", "--lr", "0.05", "--max-steps", "2"]
    command = ["train", *files, "--output-dir", str(run), *settings, *FLAGS]
    assert cli.main([*command, *flags]) == 0
    return run / "adapter"


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """Trained as ``train`` does it by default."""
    return train(base, "through")


@pytest.fixture(scope="module")
def raw_adapter(base: Path) -> Path:
    return train(base, "raw", "--raw")


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The tokens of every prompt that is generated for."""
    seen: list[list[int]] = []
    real = generate.continue_prompts

    def continued(model: Any, tokenizer: Any, ids: Any, *args: Any, **more: Any) -> Any:
        seen.extend(ids)
        return real(model, tokenizer, ids, *args, **more)

    monkeypatch.setattr(generate, "continue_prompts", continued)
    return seen


def texts(prompts: list[list[int]], base: Path) -> list[str]:
    return [AutoTokenizer.from_pretrained(base).decode(ids) for ids in prompts]


def test_an_adapter_remembers_how_it_was_asked(adapter: Path, raw_adapter: Path) -> None:
    through, raw = load_card(adapter), load_card(raw_adapter)
    assert through is not None
    assert raw is not None
    assert (through.template, raw.template) == ("chat", "{prompt}")
    assert "by the tokenizer's chat template" in (adapter / "README.md").read_text()


def test_generate_asks_an_adapter_as_it_was_trained_and_the_base_by_its_chat_template(
    base: Path, adapter: Path, raw_adapter: Path, prompts: list[list[int]]
) -> None:
    asked = {"model": str(base), "prompt": "why?", "max_new_tokens": 2, "quiet": True}
    asked |= {"storage": "fp32", "device": "cpu"}
    given: list[dict[str, Any]] = [
        {"adapter": str(adapter)},
        {},
        {"adapter": str(raw_adapter)},
        {"raw": True},
        {"adapter": str(adapter), "raw": True},
        {"adapter": str(raw_adapter), "template": "chat"},
        {"adapter": f"{raw_adapter},__base__"},
    ]
    for more in given:
        lr.generate(**asked, **more)
    through = CHAT.format(prompt="why?")
    wanted = [through, through, "why?", "why?", "why?", through, "why?", "why?"]
    assert texts(prompts, base) == wanted


def test_an_answer_in_generate_is_that_of_a_pass_over_the_tokens_of_training(
    base: Path, adapter: Path
) -> None:
    found = lr.generate(model=str(base), adapter=str(adapter), prompt="why?", max_new_tokens=4)
    card = load_card(adapter)
    assert card is not None
    from lowmem_reft.methods.loading import load_adapted
    from lowmem_reft.options import ModelOptions

    model, tokenizer = load_adapted(ModelOptions(model=str(base), device="cpu"), adapter, card)
    (row,) = load_rows(json_lines(base.parent / "one.jsonl", ROWS[1]))
    (example,) = encode_rows([row], tokenizer, **card.prompts).examples
    size = example["labels"].count(-100)
    ids, new = example["input_ids"][:size], []
    assert tokenizer.decode(ids) == CHAT.format(prompt="why?")
    assert tokenizer.decode(example["input_ids"][size:]) == " a dog</s>"
    with torch.no_grad():
        while len(new) < 4 and new[-1:] != [tokenizer.eos_token_id]:
            labels = torch.tensor([[-100] * size + new])
            logits = model(input_ids=torch.tensor([ids + new]), labels=labels).logits
            new.append(int(logits[0, -1].argmax()))
    assert found.response == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("raw", [False, True])
def test_evaluate_scores_choices_after_what_the_chat_template_writes(
    base: Path, raw: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    data = base.parent / "choices.jsonl"
    options = {"model": str(base), "data": str(data), "storage": "fp32", "device": "cpu"}
    result = lr.evaluate(**options, raw=raw)
    err = capsys.readouterr().err
    assert ("prompts are written by the tokenizer's chat template; --raw" in err) == (not raw)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in load_rows(data):
        prompt = row.prompt if raw else CHAT.format(prompt=row.prompt)
        text = f"{prompt} good" if raw else f"{prompt} good</s>"
        ids = tokenizer([prompt, text], add_special_tokens=False)["input_ids"]
        size = len(ids[0])
        with torch.no_grad():
            logits = model(torch.tensor([ids[1]])).logits[0, size - 1 : -1].double()
        wanted = torch.tensor(ids[1][size:])
        total -= float(logits.log_softmax(-1).gather(1, wanted[:, None]).sum())
        count += len(wanted)
    assert result.loss == pytest.approx(total / count, rel=1e-4)


def test_scored_answers_end_with_the_turn(
    base: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    data = json_lines(tmp_path / "n.jsonl", {"prompt": "why?", "response": "1"})
    options = {"model": str(base), "data": str(data), "max_new_tokens": 2, "storage": "fp32"}
    lr.evaluate(**options, answer_pattern=r"\d")
    lr.evaluate(**options, answer_pattern=r"\d", raw=True)
    assert texts(prompts, base) == [CHAT.format(prompt="why?"), "why?"]


def test_training_says_what_was_chosen(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--model", str(base), "--data", str(base.parent / "rows.jsonl")]
    command += ["--output-dir", str(base.parent / "dry"), "--max-steps", "1", "--storage", "fp32"]
    assert cli.main([*command, "--overwrite"]) == 0
    err = capsys.readouterr().err
    assert "(prompts are written by the tokenizer's chat template; --raw writes them as" in err
    assert cli.main([*command, "--overwrite", "--raw"]) == 0
    assert "(prompts are written as '{prompt}')" in capsys.readouterr().err


def test_data_and_plan_count_the_tokens_that_are_trained(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = base.parent / "rows.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(base)
    for flags, template in (([], "chat"), (["--raw"], "{prompt}")):
        lengths = [
            len(example["input_ids"])
            for example in encode_rows(load_rows(data), tokenizer, template=template).examples
        ]
        assert cli.main(["data", str(data), "--model", str(base), "--json", *flags]) == 0
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert shown["lengths"]["whole"]["max"] == max(lengths)
        planned = build(PlanOptions, model=str(base), data=str(data), raw=bool(flags))
        examples, _ = read_examples(planned, None)
        assert longest_of(examples)[0] == max(lengths)


def test_two_ways_at_once_are_refused(base: Path) -> None:
    data = str(base.parent / "rows.jsonl")
    with pytest.raises(InputError, match=r"raw must be left out with template, got 'Q: "):
        lr.evaluate(model=str(base), data=data, raw=True, template="Q: {prompt}")
    with pytest.raises(InputError, match="raw must be left out with tasks"):
        build(CompareOptions, tasks="trec", raw=True)


def keys(options: CompareOptions) -> list[str]:
    cells = build_cells(options, parse_methods("loreft"), [0], find_sources(options))
    return [cell.record["key"] for cell in cells]


def test_cells_that_are_asked_otherwise_have_other_keys_and_raw_ones_those_of_before(
    base: Path, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(base.parent / "rows.jsonl")
    options = build(CompareOptions, model=str(base), data=data, eval_data=data, output_dir=tmp_path)
    cells = build_cells(options, parse_methods("loreft"), [0], find_sources(options))
    given = {cell.evaluate.data.template for cell in cells}
    assert given | {cells[1].train.data.template if cells[1].train else None} == {"chat"}
    raw = changed(options, raw=True)
    assert not set(keys(raw)) & set(keys(options))
    monkeypatch.setattr("lowmem_reft.compare.sources.model_digest", lambda _: "m")
    without = changed(options, model=str(tiny_llama_dir))
    assert keys(raw) == keys(without)
    assert {cell.evaluate.prompts.raw for cell in build_cells(
        raw, parse_methods("loreft"), [0], find_sources(raw)
    )} == {True}  # fmt: skip
    chats = [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant")]}]
    file = str(json_lines(tmp_path / "chats.jsonl", *chats))
    cells = build_cells(
        of := changed(options, data=file, eval_data=file),
        parse_methods("loreft"),
        [0],
        find_sources(of),
    )
    assert {cell.evaluate.data.template for cell in cells} == {None}


def test_choices_have_the_tokens_that_a_cell_scores(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = load_rows(base.parent / "choices.jsonl")
    encoded = encode_all_choices(rows, tokenizer, template="chat")
    trained = encode_rows(rows, tokenizer, template="chat").examples
    assert [each.examples[0] for each in encoded] == trained
