"""``lowmem-reft data``: what is shown is what training takes."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lowmem_reft import cli
from lowmem_reft.base.loading import load_tokenizer
from lowmem_reft.data.rows import load_rows
from lowmem_reft.data.tokens import encode_rows
from lowmem_reft.errors import InputError
from lowmem_reft.options import PromptOptions, ShownDataOptions, ShowOptions
from lowmem_reft.runs.show import run_show
from written import json_lines

ROWS = [
    {"prompt": "is the film good?", "response": "good"},
    {"prompt": "is the film good? is the film bad?", "response": "bad bad"},
    {"prompt": "good", "response": "good " * 20},
]
CHAT = [{"role": "user", "content": "is the film good?"}, {"role": "assistant", "content": "good"}]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return json_lines(tmp_path / "rows.jsonl", *ROWS)


def _show(data: Path, model: Path, *, max_length: int = 512, **options: Any) -> dict[str, Any]:
    rows = ShownDataOptions(data=str(data), max_length=max_length)
    return run_show(ShowOptions(data=rows, model=str(model), **options))


def test_the_tokens_and_parts_are_those_of_training(data: Path, tiny_llama_dir: Path) -> None:
    result = _show(data, tiny_llama_dir, positions="f1+l1", json=True, num=2)
    tokenizer = load_tokenizer(tiny_llama_dir)
    examples = encode_rows(load_rows(data), tokenizer).examples
    assert len(result["rows"]) == 2
    for shown, example in zip(result["rows"], examples, strict=False):
        assert shown["ids"] == example["input_ids"]
        assert shown["tokens"] == tokenizer.convert_ids_to_tokens(example["input_ids"])
        supervised = [i for i, label in enumerate(example["labels"]) if label != -100]
        assert shown["supervised"] == supervised
        assert shown["prompt"] == list(range(supervised[0]))
        assert shown["edited"] == [0, supervised[0] - 1]
        assert shown["end"] == [len(example["input_ids"]) - 1]


def test_a_row_of_many_tokens_is_shown_in_time_that_grows_with_its_length(
    tmp_path: Path, tiny_llama_dir: Path
) -> None:
    data = json_lines(tmp_path / "rows.jsonl", {"prompt": "good", "response": "good " * 40_000})
    start = time.process_time()
    (row,) = _show(data, tiny_llama_dir, json=True)["rows"]
    assert len(row["supervised"]) > 40_000
    assert time.process_time() - start < 20  # s; it took minutes


def test_edited_tokens_of_the_answer_are_marked_too(
    data: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _show(data, tiny_llama_dir, positions="l1+response", json=True, num=1)["rows"][0]
    assert shown["edited"] == [shown["prompt"][-1], *shown["supervised"]]
    capsys.readouterr()
    _show(data, tiny_llama_dir, positions="l1+response", num=1)
    line = capsys.readouterr().out.splitlines()[3]
    assert line.endswith("[?] [{·good}] [<<</s>>>] ")


def test_without_positions_those_of_training_are_edited(data: Path, tiny_llama_dir: Path) -> None:
    result = _show(data, tiny_llama_dir, json=True, num=1)
    assert result["positions"] == "all"
    assert result["rows"][0]["edited"] == result["rows"][0]["prompt"]


def test_a_classifier_has_no_answer_to_edit(data: Path, tiny_llama_dir: Path) -> None:
    with pytest.raises(InputError, match=r"positions must edit the prompt with task_type SEQ_CLS"):
        _show(data, tiny_llama_dir, positions="response", task_type="SEQ_CLS")


def test_figures_are_of_all_rows(data: Path, tiny_llama_dir: Path) -> None:
    whole = _show(data, tiny_llama_dir, json=True, num=0)
    lengths = whole["lengths"]
    examples = encode_rows(load_rows(data), load_tokenizer(tiny_llama_dir)).examples
    sizes = sorted(len(example["input_ids"]) for example in examples)
    assert list(lengths["whole"].values()) == [sizes[0], sizes[1], sizes[2], sizes[2]]
    assert (whole["num_rows"], whole["kind"], whole["rows"]) == (3, "response", [])
    assert (whole["num_cut_rows"], whole["num_too_long"], whole["num_with_end"]) == (0, 0, 3)
    cut = _show(data, tiny_llama_dir, max_length=len(examples[1]["input_ids"]) - 2, json=True)
    assert (cut["num_cut_rows"], cut["num_cut_tokens"], cut["num_too_long"]) == (1, 2, 1)
    assert cut["too_long"] == [{"source": f"{data}:3", "num_tokens": len(examples[2]["input_ids"])}]
    assert [row["fits"] for row in cut["rows"]] == [True, True, False]
    assert cut["lengths"] == lengths


def test_ignored_columns_are_named(tiny_llama_dir: Path, tmp_path: Path) -> None:
    data = json_lines(tmp_path / "rows.jsonl", {**ROWS[0], "id": 3})
    result = _show(data, tiny_llama_dir, json=True)
    assert (result["columns"], result["ignored_columns"]) == (["prompt", "response"], ["id"])


def test_rows_with_words_that_the_tokenizer_does_not_know_are_named(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    words = {"<unk>": 0, "</s>": 1, "is": 2, "good": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    known = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>"
    )
    known.save_pretrained(tmp_path)
    shutil.copy(tiny_llama_dir / "config.json", tmp_path)
    rows = [{"prompt": prompt, "response": "good"} for prompt in ("is", "is not")]
    data = json_lines(tmp_path / "rows.jsonl", *rows)
    result = _show(data, tmp_path, json=True)
    assert (result["num_with_unknown_tokens"], result["with_unknown_tokens"]) == (1, [f"{data}:2"])


def test_of_chats_is_said_what_their_template_does_not_use(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, tmp_path / name)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    row = {"messages": CHAT, "tools": [{"name": "weather"}]}
    result = _show(json_lines(tmp_path / "rows.jsonl", row), tmp_path, json=True)
    assert (result["kind"], result["unused_template_arguments"]) == ("messages", ["tools"])
    assert result["template"] is None


def test_texts_of_a_classification_are_shown_with_their_labels(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    rows = [{"text": "is the film good?", "label": name} for name in ("yes", "no")]
    result = _show(
        json_lines(tmp_path / "rows.jsonl", *rows), tiny_llama_dir, task_type="SEQ_CLS", json=True
    )
    assert [row["label"] for row in result["rows"]] == ["yes", "no"]
    assert (list(result["lengths"]), result["num_with_end"]) == (["whole"], None)
    assert result["rows"][0]["edited"] == list(range(len(result["rows"][0]["ids"])))


def test_parts_are_told_apart_without_colour_and_nothing_moves_the_terminal(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "is the film good? \x1b[2J", "response": "[bold]good[/bold]"}
    _show(json_lines(tmp_path / "rows.jsonl", row), tiny_llama_dir, positions="l1")
    out = capsys.readouterr().out
    assert "prompt  [edited]  {supervised}  <<end>>" in out
    assert "\x1b" not in out
    assert "1 rows of kind response, read from prompt, response" in out


def test_a_long_row_is_printed_without_its_middle(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short, long = ({"prompt": "good " * size, "response": "bad"} for size in (50, 5_000))
    data = json_lines(tmp_path / "rows.jsonl", short, long)
    result = _show(data, tiny_llama_dir, max_length=8192)
    assert len(result["rows"][1]["texts"]) > 5_000
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "left out" in line]
    assert re.search(r"good ?\S* ?\.\.\. \([\d,]{6,} characters left out\) \.\.\. ", line)
    assert line.endswith(">> ")
    assert len(line) < 2_100


def test_where_long_rows_are_left_out_none_is_cut(data: Path, tiny_llama_dir: Path) -> None:
    size = _show(data, tiny_llama_dir, json=True)["lengths"]["whole"]["median"]
    prompts = PromptOptions(long_rows="drop")
    found = _show(data, tiny_llama_dir, max_length=size - 1, json=True, prompts=prompts)
    assert (found["num_cut_rows"], found["num_too_long"]) == (0, 2)
    assert [row["fits"] for row in found["rows"]] == [True, False, False]


def test_the_command_prints_one_object_and_needs_no_weights(
    data: Path, tiny_llama_dir: Path, no_base: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.main(["data", str(data), "--model", str(tiny_llama_dir), "--json", "--num", "1"]) == 0
    )
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["num_rows"], len(result["rows"])) == (3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": -1}, "num must be finite and at least 0"),
        ({"positions": "x3"}, "positions must be"),
    ],
    ids=["num", "positions"],
)
def test_a_wrong_option_is_refused(
    options: dict[str, Any], message: str, data: Path, tiny_llama_dir: Path
) -> None:
    with pytest.raises(InputError, match=message):
        _show(data, tiny_llama_dir, **options)
