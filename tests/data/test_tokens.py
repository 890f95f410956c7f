from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.cutting import encode_those_that_fit
from lowmem_reft.data.rows import (
    Row,
    as_choices,
    as_records,
    holdout,
    label_names,
    load_rows,
    rows_digest,
)
from lowmem_reft.data.tokens import (
    Collator,
    encode_choices,
    encode_labelled,
    encode_prompts,
    encode_rows,
)
from lowmem_reft.errors import InputError
from made_tokenizers import (
    CHAT_TEMPLATE,
    SPECIAL,
    TEMPLATE,
    TOKENIZERS,
    byte_level_tokenizer,
    word_level_tokenizer,
    wrapped,
)


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    return byte_level_tokenizer(bos=True)


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer(bos=True, eos="<|end|>")
    tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    return tokenizer


def _row(prompt: str, response: str) -> Row:
    return Row(source="rows.jsonl:7", prompt=prompt, response=response)


def _choice_row(prompt: str, *choices: str) -> Row:
    return Row(source="rows.jsonl:7", prompt=prompt, choices=choices, answer=0, response=choices[0])


def _chat_row(*contents: str) -> Row:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return Row(source="rows.jsonl:7", messages=tuple(messages), response=contents[-1])


def _parts(example: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """Prompt tokens and supervised tokens; they are in this order and nothing else is there."""
    size = example["labels"].count(IGNORED_LABEL)
    assert example["labels"][:size] == [IGNORED_LABEL] * size
    assert example["labels"][size:] == example["input_ids"][size:]
    return example["input_ids"][:size], example["input_ids"][size:]


def _prompt_ids(row: Row, tokenizer: Any, **options: Any) -> list[int]:
    (example,) = encode_prompts([row], tokenizer, **options).examples
    return example["input_ids"]


def _write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- rows -----------------------------------------------------------------------------------

KINDS = {
    "response": [{"prompt": "a {b}", "response": 'c, "d"\ne'}, {"prompt": "f", "response": "g"}],
    "messages": [
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "there"},
            ]
        }
    ],
    "choices": [{"prompt": "a", "choices": ["b", "c,d"], "answer": 1}],
    "label": [{"text": "a", "label": 1}, {"text": "b", "label": 0}],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    records: list[dict[str, Any]] = KINDS[kind]
    _write(tmp_path / "rows.jsonl", *records)
    _write(tmp_path / "lines.json", *records)
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    Dataset.from_list(records).to_parquet(tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]))
        writer.writeheader()
        for record in records:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list) else v for k, v in record.items()}
            )
    names = ["rows.jsonl", "lines.json", "list.json", "rows.parquet", "rows.csv"]
    rows = [load_rows(tmp_path / name) for name in names]
    assert [row.kind for row in rows[0]] == [kind] * len(records)
    assert len({rows_digest(read) for read in rows}) == 1
    assert rows[0][0].source == f"{tmp_path / 'rows.jsonl'}:1"
    assert (
        rows[4][-1].source
        == f"{tmp_path / 'rows.csv'}:{4 if kind == 'response' else len(rows[0]) + 1}"
    )


def test_a_datasets_id_is_loaded_with_its_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        calls.append((args, kwargs))
        return [{"prompt": "a", "response": "b"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    (row,) = load_rows("org/set-1.5:main", split="test")
    assert calls == [(("org/set-1.5", "main"), {"split": "test"})]
    assert (row.source, row.prompt) == ("org/set-1.5:main[test], row 1", "a")


def test_an_unknown_datasets_id_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("no such set")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"'org/set' \(no such set\); check path, id and split"):
        load_rows("org/set")


def test_limit_reads_only_the_first_rows(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, "not a row")
    assert len(load_rows(path, limit=1)) == 1
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        load_rows(path, limit=0)


def test_blank_lines_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"prompt": "a", "response": "b"}\n\n', encoding="utf-8")
    assert [(row.prompt, row.response) for row in load_rows(path)] == [("a", "b")]


GOOD = {"prompt": "a", "response": "b"}
USER = {"role": "user", "content": "hi"}
BAD_ROWS = {
    "not an object": ("a", "must be a JSON object, got str"),
    "unknown columns": ({"question": "a"}, r"must have prompt \+ response.*got \['question'\]"),
    "null response": (
        {"prompt": "a", "response": None},
        r"got \['prompt'\], and nothing in \['response'\]; fill",
    ),
    "two kinds": ({**GOOD, "text": "a", "label": "b"}, "must fit only one of"),
    "empty prompt": ({"prompt": "", "response": "b"}, "prompt must be a non-empty string, got ''"),
    "empty response": ({"prompt": "a", "response": " "}, "response must be a non-empty string"),
    "number": ({"prompt": 1, "response": "b"}, "prompt must be a non-empty string, got 1"),
    "half a character": ({"prompt": "\ud800", "response": "b"}, "prompt must be valid Unicode"),
    "one choice": ({"prompt": "a", "choices": ["b"], "answer": 0}, "choices must be a list of two"),
    "empty choice": ({"prompt": "a", "choices": ["b", ""], "answer": 0}, r"choices\[1\] must be a"),
    "answer out of range": (
        {"prompt": "a", "choices": ["b", "c"], "answer": 2},
        "answer must be an integer from 0 to 1, got 2; give the index",
    ),
    "answer as letter": ({"prompt": "a", "choices": ["b", "c"], "answer": "A"}, "got 'A'; give"),
    "answer as bool": ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "got True; give"),
    "label as float": ({"text": "a", "label": 0.5}, "label must be a non-empty string or an int"),
    "target as text": ({"text": "a", "target": "many"}, "target must be a number, got 'many'"),
    "target not finite": ({"text": "a", "target": "nan"}, "target must be a number, got 'nan'"),
    "target too large": ({"text": "a", "target": 10**400}, "target must be a number, got 1000"),
    "target as bool": ({"text": "a", "target": True}, "target must be a number, got True"),
    "label and target": ({"text": "a", "label": "b", "target": 1}, "must fit only one of"),
    "pair as number": ({"text": "a", "text_pair": 2, "label": "b"}, "text_pair must be a non-emp"),
    "no messages": ({"messages": []}, r"messages must be a list of \{role, content\} objects"),
    "no content": ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be"),
    "no response": ({"messages": [USER]}, "the last message must be the assistant's, got 'user'"),
    "no question": ({"messages": [{**USER, "role": "assistant"}]}, "a prompt before the response"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_wrong_row_is_an_error_with_file_and_line(name: str, tmp_path: Path) -> None:
    record, message = BAD_ROWS[name]
    path = _write(tmp_path / "rows.jsonl", record)
    path.write_text("\n" + path.read_text())
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{message}"):
        load_rows(path)


def test_mixed_kinds_are_an_error_with_file_and_line(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", GOOD, {"text": "a", "label": "b"})
    with pytest.raises(InputError, match=r"rows\.jsonl:2: all rows must be of one kind"):
        load_rows(path)


BAD_FILES = {
    "rows.jsonl": ('{"prompt": "a"', r"rows\.jsonl:1: must be valid JSON"),
    "rows.json": ('[{"prompt": "a"', r"rows\.json:1: must be valid JSON.*line 1"),
    "rows.csv": ('prompt,response\na,b\na,"b\n', r"rows\.csv:3: must be valid CSV"),
    "wide.csv": ("prompt,response\na,b,c\n", r"wide\.csv:2: must have as many cells"),
    "null.jsonl": (
        '{"prompt": "a", "response": null}',
        r"null\.jsonl:1: a row must have .* got \['prompt'\], and nothing in \['response'\]; fill",
    ),
    "preferences.jsonl": (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}',
        r"preferences\.jsonl:1: a row must have .*; preferences are trained with TRL",
    ),
    "narrow.csv": ("prompt,response\na\n", r"narrow\.csv:2: a row must have prompt \+ response"),
    "choices.csv": (
        "prompt,choices,answer\na,b|c,0\n",
        r"choices\.csv:2: choices: must be valid JSON",
    ),
    "rows.parquet": ("no", r"rows\.parquet: must be a Parquet file"),
    "empty.jsonl": ("\n", "at least one row, got none in .*empty.jsonl"),
    "rows.txt": ("a", "must be a .jsonl, .ndjson, .json, .csv, .tsv, .parquet file or"),
    "latin.jsonl": ("\udce9", "must be readable UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_wrong_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    text, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        load_rows(tmp_path / name)


def test_a_directory_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data must be a file, got the directory .*; name a file"):
        load_rows(tmp_path)


@pytest.mark.parametrize("source", ["nowhere/rows.jsonl", "/nowhere/rows.csv", "rows.parquet"])
def test_a_missing_file_is_an_error_that_names_it(source: str) -> None:
    with pytest.raises(InputError, match=f"must be an existing file, got '{source}'"):
        load_rows(source)


def test_a_source_of_prompts_that_is_wrong_is_called_input_and_is_asked_for_prompts(
    tmp_path: Path,
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for path, message in {
        empty: "input must have at least one row, got none in .*; give prompt or messages$",
        tmp_path / "none.jsonl": "input must be an existing file",
        tmp_path / "rows.txt": "input must be a .jsonl",
        _write(tmp_path / "rows.jsonl", {"text": "a"}): "must have prompt or messages, got",
    }.items():
        with pytest.raises(InputError, match=message):
            load_rows(path, require_response=False)


def test_prompts_without_response_are_read_on_request(tmp_path: Path) -> None:
    prompts = load_rows(_write(tmp_path / "a.jsonl", {"prompt": "a"}), require_response=False)
    chats = load_rows(_write(tmp_path / "b.jsonl", {"messages": [USER]}), require_response=False)
    assert (prompts[0].kind, prompts[0].response) == ("prompt", None)
    assert (chats[0].kind, chats[0].prompt_messages) == ("messages", [USER])


def test_label_names_are_in_numerical_or_alphabetical_order() -> None:
    def rows(*labels: str) -> list[Row]:
        return [Row(source="a:1", prompt="t", response=x, label=x) for x in labels]

    assert label_names(rows("10", "9", "-1", "9")) == ["-1", "9", "10"]
    assert label_names(rows("b", "10", "a", "9")) == ["10", "9", "a", "b"]
    with pytest.raises(InputError, match="at least two values, got"):
        label_names(rows("a", "a"))


def test_labelled_rows_become_choices_over_all_labels() -> None:
    rows = [Row(source=f"a:{i}", prompt="t", response=x, label=x) for i, x in enumerate("bac")]
    choices = as_choices(rows)
    assert [(row.choices, row.answer) for row in choices] == [
        (("a", "b", "c"), i) for i in (1, 0, 2)
    ]
    assert as_choices(choices) == choices
    with pytest.raises(InputError, match=r"a:2: label must be one of \['a', 'b'\], got 'c'"):
        as_choices(rows, ["a", "b"])


def test_both_texts_of_a_pair_are_in_the_prompt_of_its_choices() -> None:
    row = Row(source="a:1", prompt="first", text_pair="second", response="x", label="x")
    (choice,) = as_choices([row], ["x", "y"])
    assert (choice.prompt, choice.text_pair, choice.label) == ("first\nsecond", None, None)


PAIRS = [
    {"text": "a", "text_pair": "b", "label": "x"},
    {"text": "a", "text_pair": "b", "target": 3.5},
    {"text": "a", "target": -1.0},
    {"prompt": "a", "choices": ["0", "1"], "answer": 1, "target": 0.75},
]


@pytest.mark.parametrize("record", PAIRS, ids=lambda record: ", ".join(record))
def test_pairs_and_targets_are_read_and_written_back(
    record: dict[str, Any], tmp_path: Path
) -> None:
    (row,) = load_rows(_write(tmp_path / "rows.jsonl", record))
    assert as_records([row]) == [record]
    assert (row.text_pair, row.target) == (record.get("text_pair"), record.get("target"))


def test_targets_are_numbers_in_csv_files_too_and_empty_cells_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,text_pair,target\na,b,3.5\nc,,4\n")
    rows = load_rows(path)
    assert [(row.text_pair, row.target) for row in rows] == [("b", 3.5), (None, 4.0)]
    path.write_text('prompt,choices,answer,target\na,"[""0"", ""1""]",1,\n')
    assert [row.target for row in load_rows(path)] == [None]


def test_holdout_depends_on_content_only_and_keeps_identical_rows_together() -> None:
    rows = [_row(str(i % 50), "x") for i in range(100)]
    train, held_out = holdout(rows, 0.1)
    assert len(held_out) == 10
    assert len(train) == 90
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    moved = [Row(source="elsewhere:1", prompt=r.prompt, response="x") for r in reversed(rows)]
    assert sorted(r.prompt for r in holdout(moved)[1]) == sorted(r.prompt for r in held_out)


def test_folds_hold_out_each_row_once() -> None:
    rows = [Row(prompt=f"question {i}", response="yes", source=f"d:{i}") for i in range(40)]
    held_out = [holdout(rows, 0.1, fold=fold)[1] for fold in range(10)]
    assert sorted(row.prompt for part in held_out for row in part) == sorted(r.prompt for r in rows)
    assert held_out[0] == holdout(rows)[1]
    for fold in (-1, 10):
        with pytest.raises(InputError, match=f"fold must be from 0 to 9 .* got {fold}"):
            holdout(rows, 0.1, fold=fold)


def test_holdout_leaves_both_sides_a_row_or_refuses() -> None:
    rows = [_row("a", "x"), _row("b", "x")]
    assert [len(side) for side in holdout(rows, 0.01)] == [1, 1]
    assert [len(side) for side in holdout(rows, 0.99)] == [1, 1]
    with pytest.raises(InputError, match="two different rows to hold one out, got 1"):
        holdout([rows[0], rows[0]])
    with pytest.raises(InputError, match="fraction must be between 0 and 1, got 1"):
        holdout(rows, 1)


def test_digest_follows_content_and_order() -> None:
    rows = [_row("a", "x"), _row("b", "x")]
    assert rows_digest(rows) == rows_digest(
        [Row(source="other:1", prompt="a", response="x"), rows[1]]
    )
    assert rows_digest(rows) != rows_digest(rows[::-1])
    assert rows_digest(rows) != rows_digest(rows[:1])
    pair = Row(source="a:1", prompt="a", response="x", text_pair="b")
    assert rows_digest([pair]) != rows_digest(rows[:1])


def test_rows_without_pair_or_target_keep_the_digest_they_had_before_there_were_such() -> None:
    content = {"answer": None, "choices": [], "label": None, "messages": [], "prompt": "a"}
    line = json.dumps({**content, "response": "x", "source": ""}) + "\n"
    assert rows_digest([_row("a", "x")]) == hashlib.sha256(line.encode()).hexdigest()


# --- encoding ------------------------------------------------------------------------------


def test_supervised_tokens_are_the_response_and_eos(tokenizer: Any) -> None:
    (example,) = encode_rows(
        [_row("was it good?", "positive")], tokenizer, template=TEMPLATE
    ).examples
    prompt, response = _parts(example)
    assert response[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(response[:-1]).strip() == "positive"
    text = tokenizer.decode(prompt, skip_special_tokens=True)
    assert text.replace(" ", "") in ("Question:wasitgood?\nAnswer:", "Question:wasitgood?Answer:")


def test_bos_is_there_once_if_the_tokenizer_adds_one(tokenizer: Any) -> None:
    adds = tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    for prompt in ("was", "<s>was"):
        row = _row(prompt, "positive")
        ids = encode_rows([row], tokenizer).examples[0]["input_ids"]
        if tokenizer.bos_token_id is not None:
            starts = adds or prompt == "<s>was"
            assert (ids[0] == tokenizer.bos_token_id) == starts
            assert ids[:-1].count(tokenizer.bos_token_id) == starts


@pytest.mark.parametrize("prompt", ["was it good?", "Answer: ", "Answer:  ", "Answer:\n", "a {b}"])
def test_generation_sees_the_prompt_tokens_of_training(tokenizer: Any, prompt: str) -> None:
    row = _row(prompt, "positive")
    trained, _ = _parts(encode_rows([row], tokenizer).examples[0])
    assert _prompt_ids(row, tokenizer) == trained


def test_spaces_at_the_joint_belong_to_the_response(byte_level: Any) -> None:
    encoded = [
        encode_rows([_row(prompt, response)], byte_level).examples[0]
        for prompt, response in (("Answer:", "good"), ("Answer: ", "good"), ("Answer:", " good"))
    ]
    assert encoded[0] == encoded[1] == encoded[2]
    assert byte_level.decode(_parts(encoded[0])[1]) == " good</s>"
    newline = encode_rows([_row("Answer:\n", "good")], byte_level).examples[0]
    assert byte_level.decode(_parts(newline)[1]) == "good</s>"


@pytest.mark.parametrize("decoder", [decoders.Fuse(), None], ids=["fused", "spaced"])
def test_what_is_merged_across_the_joint_is_taken_apart_or_refused(decoder: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        special_tokens=SPECIAL, initial_alphabet=list("Answer:\nok "), show_progress=False
    )
    tokenizer.train_from_iterator(["er:\nok"] * 9, trainer)  # no pre-tokenizer: one token
    if decoder is not None:
        tokenizer.decoder = decoder
    merging, row = wrapped(tokenizer, bos=False), _row("Answer:", "\nok")
    if decoder is None:  # it writes spaces between tokens: other text than the row's
        with pytest.raises(InputError, match=r"must not merge prompt and response, got .*er:\\nok"):
            encode_rows([row], merging)
        return
    prompt, response = _parts(encode_rows([row], merging).examples[0])
    assert prompt == encode_prompts([row], merging).examples[0]["input_ids"]
    assert merging.decode(prompt) == "Answer:"
    assert merging.decode(response) == "\nok</s>"


def test_eos_that_the_response_ends_with_is_not_doubled(byte_level: Any) -> None:
    (example,) = encode_rows([_row("a", "good</s>")], byte_level).examples
    assert example["input_ids"].count(byte_level.eos_token_id) == 1


def test_a_tokenizer_without_eos_and_pad_ends_with_the_response_and_pads_with_zero() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(bos=False).backend_tokenizer
    )
    examples = encode_rows([_row("a b c", "ok"), _row("a", "ok")], tokenizer).examples
    assert tokenizer.decode(_parts(examples[0])[1]) == " ok"
    assert Collator(tokenizer)(examples)["input_ids"][1, -1] == 0


def test_a_response_that_the_tokenizer_drops_is_an_error_with_its_line() -> None:
    tokenizer = Tokenizer(models.BPE())  # characters that it does not know become nothing
    tokenizer.train_from_iterator(["abc"], trainers.BpeTrainer(show_progress=False))
    with pytest.raises(InputError, match=r"rows\.jsonl:7: response must have tokens, got none"):
        encode_choices(
            _choice_row("c", "b", "x"), PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        )


def test_braces_in_prompts_and_templates_are_kept(byte_level: Any) -> None:
    (example,) = encode_rows(
        [_row("{x} {0} {prompt", "ok")], byte_level, template="{a} {prompt} {}"
    ).examples
    assert byte_level.decode(example["input_ids"]) == "<s>{a} {x} {0} {prompt {} ok</s>"


def test_a_template_without_prompt_is_refused(byte_level: Any) -> None:
    with pytest.raises(InputError, match=r"template must contain \{prompt\}, got 'Q: \{\}'"):
        encode_rows([_row("a", "b")], byte_level, template="Q: {}")


def test_long_prompts_are_cut_from_the_left_and_counted(tokenizer: Any) -> None:
    long, short = _row("good film " * 30 + "was it good?", "positive"), _row("a", "positive")
    whole = encode_rows([long], tokenizer).examples[0]
    cut = encode_rows([long, short], tokenizer, max_length=20)
    prompt, response = _parts(whole)
    cut_prompt, cut_response = _parts(cut.examples[0])
    assert cut_response == response
    assert len(cut.examples[0]["input_ids"]) == 20
    num_bos = int(prompt[0] == tokenizer.bos_token_id)
    assert cut_prompt == prompt[:num_bos] + prompt[num_bos + cut.num_cut_tokens :]
    assert cut.num_cut_prompts == 1
    assert cut.num_cut_tokens == len(whole["input_ids"]) - 20
    assert _prompt_ids(long, tokenizer, max_length=len(cut_prompt)) == cut_prompt


def test_cut_prompts_are_counted_once_however_many_choices_follow(tokenizer: Any) -> None:
    row = _choice_row("good film " * 30 + "was it good?", "positive", "ok", "negative")
    whole, cut = encode_choices(row, tokenizer), encode_choices(row, tokenizer, max_length=30)
    assert (whole.num_cut_prompts, whole.num_cut_tokens) == (0, 0)
    assert cut.num_cut_prompts == 1
    num_prompt, num_kept = (len(_parts(encoded.examples[0])[0]) for encoded in (whole, cut))
    assert cut.num_cut_tokens == num_prompt - num_kept


def test_cut_prompts_are_counted_where_there_is_no_response(tokenizer: Any) -> None:
    rows = [_row("good film " * 30, "ok"), _row("a", "ok")]
    encoded = encode_prompts(rows, tokenizer, max_length=10)
    assert len(encoded.examples[0]["input_ids"]) == 10
    assert encoded.num_cut_prompts == 1
    assert encoded.num_cut_tokens == len(_prompt_ids(rows[0], tokenizer)) - 10


def test_a_response_that_does_not_fit_is_an_error_with_its_line(tokenizer: Any) -> None:
    row = _row("was it good?", "positive")
    prompt, response = _parts(encode_rows([row], tokenizer).examples[0])
    least = len(response) + 1 + int(prompt[0] == tokenizer.bos_token_id)
    assert len(encode_rows([row], tokenizer, max_length=least).examples[0]["input_ids"]) == least
    with pytest.raises(InputError, match=r"rows\.jsonl:7: response must leave room.*raise max_len"):
        encode_rows([row], tokenizer, max_length=least - 1)


def test_choices_share_the_prompt_have_no_eos_and_are_trained_as_they_are_scored(
    tokenizer: Any,
) -> None:
    row = _choice_row("was it good?", "positive", "negative film", "ok")
    for max_length in (512, 40):
        encoded = encode_choices(row, tokenizer, template=TEMPLATE, max_length=max_length)
        parts = [_parts(example) for example in encoded.examples]
        assert len({tuple(prompt) for prompt, _ in parts}) == 1
        assert max(len(prompt) + len(response) for prompt, response in parts) <= max_length
        assert [response[-1:] == [tokenizer.eos_token_id] for _, response in parts] == [False] * 3
    trained, response = _parts(encode_rows([row], tokenizer, template=TEMPLATE).examples[0])
    scored = encode_choices(row, tokenizer, template=TEMPLATE).examples[0]["input_ids"]
    assert trained + response == scored


def test_choices_are_asked_of_rows_that_have_them(byte_level: Any) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:7: a row must have choices, got a response"):
        encode_choices(_row("a", "b"), byte_level)


def test_chats_are_written_by_the_chat_template_with_one_bos(chat_tokenizer: Any) -> None:
    row = _chat_row("hello", "there", "what", "a day")
    prompt, response = _parts(encode_rows([row], chat_tokenizer).examples[0])
    assert chat_tokenizer.decode(prompt) == (
        "<s><|user|>hello<|end|>\n<|assistant|>there<|end|>\n<|user|>what<|end|>\n<|assistant|>"
    )
    assert chat_tokenizer.decode(response) == "a day<|end|>"
    assert _prompt_ids(row, chat_tokenizer) == prompt
    open_chat = Row(source="a:1", messages=row.messages[:-1])
    assert _prompt_ids(open_chat, chat_tokenizer) == prompt


def test_a_cut_chat_keeps_its_bos_and_response(chat_tokenizer: Any) -> None:
    row = _chat_row("hello " * 50, "a day")
    prompt, response = _parts(encode_rows([row], chat_tokenizer, max_length=12).examples[0])
    assert (prompt[0], len(prompt) + len(response)) == (chat_tokenizer.bos_token_id, 12)
    assert chat_tokenizer.decode(response) == "a day<|end|>"


def test_chats_without_a_chat_template_are_refused(byte_level: Any) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:7: messages must come with a tokenizer"):
        encode_rows([_chat_row("hello", "there")], byte_level)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "got roles must alternate; correct"),
        ("{% if add_generation_prompt %}think{% endif %}", "must write a response after"),
    ],
)
def test_a_chat_template_that_refuses_or_rewrites_is_an_error(template: str, message: str) -> None:
    tokenizer = byte_level_tokenizer(bos=True)
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=rf"rows\.jsonl:7: .*{message}"):
        encode_rows([_chat_row("hello", "there")], tokenizer)


def test_a_row_without_response_cannot_be_trained_on(byte_level: Any) -> None:
    with pytest.raises(InputError, match=r"a:1: a row must have a response"):
        encode_rows([Row(source="a:1", prompt="b")], byte_level)


def test_labelled_texts_get_special_tokens_and_are_cut_on_the_right() -> None:
    tokenizer = word_level_tokenizer(bos=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")],
    )
    rows = [
        Row(source="a:1", prompt="good film was it", response="b", label="b"),
        Row(source="a:2", prompt="good", response="a", label="a"),
    ]
    encoded = encode_labelled(rows, tokenizer, max_length=4, label_names=label_names(rows))
    assert [tokenizer.decode(e["input_ids"]) for e in encoded.examples] == [
        "<s> good film </s>",
        "<s> good </s>",
    ]
    assert [example["labels"] for example in encoded.examples] == [1, 0]
    assert (encoded.num_cut_prompts, encoded.num_cut_tokens) == (1, 2)


def _pair_tokenizer() -> Any:
    """One that separates the texts of a pair and tells them apart by token types."""
    tokenizer = word_level_tokenizer(bos=True)
    special = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=special
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_pairs_are_tokenized_as_pairs_and_the_longer_text_is_cut_first() -> None:
    tokenizer = _pair_tokenizer()
    rows = [
        Row(source="a:1", prompt="good film was it", text_pair="good", response="b", label="b"),
        Row(source="a:2", prompt="good", text_pair="film", response="a", label="a"),
    ]
    encoded = encode_labelled(rows, tokenizer, max_length=6, label_names=label_names(rows))
    assert [tokenizer.decode(example["input_ids"]) for example in encoded.examples] == [
        "<s> good film </s> good </s>",
        "<s> good </s> film </s>",
    ]
    assert encoded.examples[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert (encoded.num_cut_prompts, encoded.num_cut_tokens) == (1, 2)
    batch = Collator(tokenizer)(encoded.examples)
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist()[1] == [1, 1, 1, 1, 1, 0]


def test_rows_with_and_without_a_pair_do_not_mix() -> None:
    rows = [
        Row(source="a:1", prompt="good", text_pair="film", target=1.0),
        Row(source="a:2", prompt="good", target=1.0),
    ]
    with pytest.raises(InputError, match="a:2: text_pair must be in all rows or in none"):
        encode_labelled(rows, _pair_tokenizer(), label_names=None)


def test_targets_are_the_labels_of_a_regression(byte_level: Any) -> None:
    rows = [Row(source=f"a:{i}", prompt="x" * i, target=i / 2) for i in (1, 2)]
    encoded = encode_labelled(rows, byte_level, label_names=None)
    labels = Collator(byte_level)(encoded.examples)["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [0.5, 1.0]
    with pytest.raises(InputError, match=r"rows\.jsonl:7: a row must have text and target"):
        encode_labelled([_row("a", "x")], byte_level, label_names=None)


# --- collating -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_by_length_on_either_side(tokenizer: Any, side: Any) -> None:
    rows = [_row("was it good? " * 3, "positive"), _row("film", "ok")]
    examples = encode_rows(rows, tokenizer).examples
    batch = Collator(tokenizer, padding_side=side)(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    for i, example in enumerate(examples):
        real = batch["attention_mask"][i].bool()
        assert batch["input_ids"][i][real].tolist() == example["input_ids"]
        assert batch["labels"][i][real].tolist() == example["labels"]
        assert set(batch["input_ids"][i][~real].tolist()) <= {tokenizer.pad_token_id}
        assert set(batch["labels"][i][~real].tolist()) <= {IGNORED_LABEL}
        assert bool(real[-1 if side == "left" else 0])


def test_real_eos_is_attended_and_supervised_where_it_also_pads() -> None:
    tokenizer = byte_level_tokenizer(bos=False, pad="</s>")
    examples = encode_rows([_row("a longer prompt", "ok"), _row("a", "ok")], tokenizer).examples
    batch = Collator(tokenizer)(examples)
    end = len(examples[1]["input_ids"]) - 1
    assert batch["input_ids"][1, end:].unique().tolist() == [tokenizer.eos_token_id]
    assert batch["attention_mask"][1, end:].tolist()[:2] == [1, 0]
    assert batch["labels"][1, end:].tolist()[:2] == [tokenizer.eos_token_id, IGNORED_LABEL]


def test_prompts_and_classes_are_collated_too(byte_level: Any) -> None:
    prompts = Collator(byte_level, "left")([{"input_ids": [5, 6]}, {"input_ids": [7]}])
    assert sorted(prompts) == ["attention_mask", "input_ids"]
    classes = Collator(byte_level)(
        [{"input_ids": [5], "labels": 1}, {"input_ids": [7], "labels": 0}]
    )
    assert classes["labels"].tolist() == [1, 0]


@pytest.mark.skipif("LOWMEM_REFT_MODELS" not in os.environ, reason="names no model directories")
def test_real_tokenizers_give_back_the_response() -> None:
    for directory in os.environ["LOWMEM_REFT_MODELS"].split(os.pathsep):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        row = _row("was {it} good, é🙂?", "It was.\nVery good.")
        (example,) = encode_rows([row], tokenizer, template=TEMPLATE).examples
        prompt, response = _parts(example)
        assert prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(response[:-1]).endswith("It was.\nVery good.")


def test_choices_of_which_one_begins_another_end_with_eos_where_they_are_trained_and_scored(
    byte_level: Any,
) -> None:
    row = _choice_row("Who?", "one", "one two")
    scored = encode_choices(row, byte_level).examples
    assert [example["input_ids"][-1] for example in scored] == [byte_level.eos_token_id] * 2
    assert encode_rows([row], byte_level).examples == scored[:1]
    other = _choice_row("Who?", "one", "two")
    assert byte_level.eos_token_id not in encode_choices(other, byte_level).examples[0]["input_ids"]


def test_a_choice_that_begins_another_is_refused_without_an_eos() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_tokenizer(bos=False).backend_tokenizer
    )
    with pytest.raises(InputError, match=r"rows\.jsonl:7: no choice may begin another"):
        encode_choices(_choice_row("Who?", "one", "one two"), tokenizer)


def test_all_rows_that_do_not_fit_are_named_at_once_or_left_out_on_request(byte_level: Any) -> None:
    rows = [
        Row(source=f"rows.jsonl:{number}", prompt="Who?", response="cat " * size)
        for number, size in enumerate((1, 40, 2, 60, 80, 100, 120), start=1)
    ]
    sizes = [len(_parts(encode_rows([row], byte_level).examples[0])[1]) for row in rows]
    told = (
        rf"rows\.jsonl:2: .* in max_length 32, got {sizes[1]} tokens, and 4 more of 7 rows do not "
        rf"fit: rows\.jsonl:4 \({sizes[3]}\), .*, \.\.\.; raise max_length \(to {max(sizes) + 2} "
    )
    with pytest.raises(InputError, match=told):
        encode_rows(rows, byte_level, max_length=32)
    assert encode_rows(rows, byte_level, max_length=max(sizes) + 2)

    def encode(some: Any) -> Any:
        return encode_rows(some, byte_level, max_length=32, long_rows="drop")

    with pytest.warns(UserWarning, match=r"5 of 7 rows were left out, the first is rows\.jsonl:2"):
        kept, encoded = encode_those_that_fit(rows, encode, long_rows="drop")
    assert kept == [rows[0], rows[2]]
    assert encoded == encode([rows[0], rows[2]])
    with pytest.raises(InputError, match="and 2 of 2 rows have more; raise max_len"):
        encode_those_that_fit([rows[1], rows[3]], encode, long_rows="drop")
