"""Tasks: rows from public files and from the hub, splits that share nothing, refusals by line."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft import cli
from lowmem_reft.data.rows import Row, label_names, load_rows
from lowmem_reft.data.tasks.answers import answers_equal, find_extractor
from lowmem_reft.data.tasks.metrics import METRICS
from lowmem_reft.data.tasks.registry import (
    TASKS,
    as_records,
    file_rows,
    find_task,
    load_task,
    summary,
)
from lowmem_reft.errors import InputError

NUM_TRAIN, NUM_OTHER = 40, 10
SPLITS = ("train", "validation", "test")
WITH_CLASSES = [
    name
    for name, task in TASKS.items()
    if task.scoring == "likelihood" and task.metric != "loss" and not name.endswith("-cloze")
]


def choice_record(i: int, labels: str = "answer1/answer2/answer3") -> dict[str, str]:
    answer = labels.split("/")[i % 2]
    options = " ".join(f"{label.capitalize()}: {label[-1]}." for label in labels.split("/"))
    return {
        "instruction": f"Please choose: question {i}\n\n{options}\n\nAnswer format: {labels}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


def number_record(i: int) -> dict[str, str]:
    return {"instruction": f"What is {i} + 1?", "output": "It is 0.", "answer": f"{i + 1}.0"}


def aqua_record(i: int) -> dict[str, str]:
    return {"instruction": f"Row {i}? Answer Choices: (A) {i} (B) 7", "answer": "AB"[i % 2]}


def mawps_record(i: int) -> dict[str, Any]:
    ans = float(i + 1) if i % 2 else f"{i + 1}"
    return {"original_text": f"{i} and 1 ?", "equation": f"x={i}+1", "ans": ans}


def gsm8k_record(i: int) -> dict[str, str]:
    return {"question": f"{i} and 1?", "answer": f"<<{i}+1={i + 1}>>It is.\n#### {i + 1}"}


def alpaca_record(i: int) -> dict[str, str]:
    given = f"Text {i}" if i % 2 else ""
    return {"instruction": f"Do {i % 20}", "input": given, "output": f"Done {i}"}


def trec_line(i: int) -> str:
    return f"{('HUM:ind', 'NUM:count')[i % 2]} Who is José {i} ?"


PAIR = "index\tsentence1\tsentence2\tlabel"
# The files of each task: name below the data directory -> (header, a line or a record by number).
JSON = {
    "boolq/{}.json": lambda i: choice_record(i, "true/false"),
    "piqa/{}.json": lambda i: choice_record(i, "solution1/solution2"),
    "social_i_qa/{}.json": choice_record,
    "hellaswag/{}.json": lambda i: choice_record(i, "ending1/ending2/ending3/ending4"),
    "winogrande/{}.json": lambda i: choice_record(i, "option1/option2"),
    "ARC-Easy/{}.json": choice_record,
    "ARC-Challenge/{}.json": choice_record,
    "openbookqa/{}.json": choice_record,
    "SVAMP/{}.json": number_record,
    "AQuA/{}.json": aqua_record,
    "mawps/{}set.json": mawps_record,
}
LINES = {
    "gsm8k/{}.jsonl": ("", lambda i: json.dumps(gsm8k_record(i))),
    "trec/TREC.{}": ("", trec_line),
    "MNLI/{}.tsv": (
        "index\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
        lambda i: f"{i}\tg\tp {i}\th\tneutral\t{('neutral', 'contradiction')[i % 2]}",
    ),
    "SST-2/{}.tsv": ("sentence\tlabel", lambda i: f'a "good film {i} \t{i % 2}'),
    "MRPC/{}.tsv": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        lambda i: f"{i % 2}\t1\t2\ta {i}\tb {i}\r",
    ),
    "CoLA/{}.tsv": ("", lambda i: f"gj04\t{i % 2}\t{'*' * (1 - i % 2)}\tThey sailed {i}."),
    "QNLI/{}.tsv": (
        "index\tquestion\tsentence\tlabel",
        lambda i: f"{i}\tq {i}?\ts {i}\t{('entailment', 'not_entailment')[i % 2]}",
    ),
    "QQP/{}.tsv": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        lambda i: f"{i}\t1\t2\tq {i}?\tr {i}?\t{i % 2}",
    ),
    "RTE/{}.tsv": (PAIR, lambda i: f"{i}\tp {i}\th\t{('entailment', 'not_entailment')[i % 2]}"),
    "STS-B/{}.tsv": (
        "index\tgenre\tsentence1\tsentence2\tscore",
        lambda i: f"{i}\tg\ta {i}\tb\t{i % 11 / 2}",
    ),
}
NAMES = {"dev": ("validation", NUM_OTHER), "dev_matched": ("validation", NUM_OTHER)}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with small files of every task under their public names."""
    root = tmp_path_factory.mktemp("data")

    def write(pattern: str, split: str, content: str) -> None:
        path = root / pattern.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="latin-1" if "TREC" in pattern else "utf-8")

    for pattern, record in JSON.items():
        splits = ("train", "valid", "test") if "mawps" in pattern else ("train", "test")
        for start, split in zip((0, 500, 900), splits, strict=False):
            size = NUM_TRAIN if split == "train" else NUM_OTHER
            write(pattern, split, json.dumps([record(start + i) for i in range(size)], indent=2))
    write("AQuA/{}.json", "dev", json.dumps([aqua_record(700 + i) for i in range(NUM_OTHER)]))
    for pattern, (header, line) in LINES.items():
        held_out = "test" if pattern.startswith(("gsm8k", "trec")) else "dev"
        held_out = "dev_matched" if "MNLI" in pattern else held_out
        num_train = 340 if pattern.startswith("gsm8k") else NUM_TRAIN
        for start, split in ((0, "train"), (500, held_out)):
            size = num_train if split == "train" else NUM_OTHER
            lines = [header] * bool(header) + [line(start + i) for i in range(size)]
            write(pattern, split, "\n".join(lines) + "\n")
    for name, record in (
        ("alpaca_data_cleaned", alpaca_record),
        ("math_10k", lambda i: {**number_record(i), "output": f"It is {i + 1}."}),
        ("commonsense_170k", choice_record),
    ):
        records = [record(i) for i in range(NUM_TRAIN)]
        write("ft-training_set/{}.json", name, json.dumps(records))
    write(
        "ultrafeedback_1k/{}.json",
        "ultrafeedback_1k",
        "".join(json.dumps(alpaca_record(i)) + "\n" for i in range(NUM_TRAIN)),
    )
    return root


def rows_by_split(name: str, data_dir: Path, **options: Any) -> dict[str, list[Row]]:
    splits = SPLITS[:2] if name in ("math10k", "commonsense170k") else SPLITS
    return {split: load_task(name, split, data_dir=data_dir, **options) for split in splits}


def inputs(rows: list[Row]) -> set[tuple[str, str | None]]:
    return {(row.prompt, row.text_pair) for row in rows}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_splits_that_share_no_input(name: str, data_dir: Path) -> None:
    splits = list(map(inputs, rows_by_split(name, data_dir).values()))
    assert all(splits)
    assert len(set().union(*splits)) == sum(map(len, splits))


@pytest.mark.parametrize(
    ("name", "task_type"),
    [*((name, "CAUSAL_LM") for name in TASKS), *((name, "SEQ_CLS") for name in WITH_CLASSES)],
)
def test_rows_come_back_from_jsonl_as_they_were(
    name: str, task_type: Any, data_dir: Path, tmp_path: Path
) -> None:
    rows = load_task(name, "train", data_dir=data_dir, task_type=task_type)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in as_records(rows)))
    assert [replace(row, source="") for row in load_rows(path)] == [
        replace(row, source="") for row in rows
    ]


@pytest.mark.parametrize("name", WITH_CLASSES)
def test_splits_hold_the_same_examples_for_either_task_type(name: str, data_dir: Path) -> None:
    causal = rows_by_split(name, data_dir)
    classifier = rows_by_split(name, data_dir, task_type="SEQ_CLS")
    for split, rows in causal.items():
        assert [row.source for row in rows] == [row.source for row in classifier[split]]


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name].labels])
def test_labels_are_those_of_the_rows_and_choices_have_their_order(
    name: str, data_dir: Path
) -> None:
    labels = find_task(name).labels
    rows = file_rows(name, "train", data_dir)
    classified = load_task(name, "train", data_dir=data_dir, task_type="SEQ_CLS")
    assert {row.label for row in classified} <= set(labels)
    if find_task(name).family == "glue":
        assert len(rows[0].choices) == len(labels)
        by_source = {row.source: row for row in rows}
        assert all(by_source[r.source].answer == labels.index(r.label) for r in classified)


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_the_positive_class_of_f1_has_index_1_for_classifiers_too(
    name: str, data_dir: Path
) -> None:
    rows = load_task(name, "train", data_dir=data_dir, task_type="SEQ_CLS")
    assert label_names(rows) == list(find_task(name).labels)
    assert find_task(name).labels[1] in ("equivalent", "duplicate")


@pytest.mark.parametrize(
    "name", [name for name, task in TASKS.items() if task.answer and task.scoring == "generation"]
)
def test_the_answer_is_found_in_every_right_response(name: str, data_dir: Path) -> None:
    task = find_task(name)
    rows = file_rows(name, "train", data_dir)
    found = [find_extractor(task.answer)(row.response) for row in rows]
    if task.answer == "option_letter":
        assert found == ["AB"[i % 2] for i in range(len(rows))]
    else:
        assert found == [str(i + 1) for i in range(len(rows))]


def test_gsm8k_is_validated_on_the_last_300_training_rows(data_dir: Path) -> None:
    public = file_rows("gsm8k", "train", data_dir)
    splits = rows_by_split("gsm8k", data_dir)
    assert [row.source for row in splits["train"] + splits["validation"]] == [
        row.source for row in public
    ]
    assert len(splits["validation"]) == 300
    assert public[0].response == "<<0+1=1>>It is.\nThe final answer is: 1"


@pytest.mark.parametrize(("num_public", "num_choosing"), [(11, 5), (5000, 2500), (5001, 1000)])
def test_the_validation_rows_of_glue_are_divided_in_the_same_way_every_time(
    num_public: int, num_choosing: int, tmp_path: Path
) -> None:
    (tmp_path / "SST-2").mkdir()
    for name, first, size in (("train", 10**6, 4), ("dev", 0, num_public)):
        lines = (f"film {first + i}\t{i % 2}\n" for i in range(size))
        (tmp_path / f"SST-2/{name}.tsv").write_text("sentence\tlabel\n" + "".join(lines))
    splits = rows_by_split("sst2", tmp_path)
    assert len(splits["validation"]) == num_choosing
    assert len(splits["test"]) == num_public - num_choosing
    assert rows_by_split("sst2", tmp_path) == splits
    # Drawn at random: not simply the first ones.
    assert splits["validation"] != file_rows("sst2", "validation", tmp_path)[:num_choosing]


def test_an_input_in_two_public_splits_leaves_the_training_rows(tmp_path: Path) -> None:
    lines = [trec_line(i) for i in range(20)]
    (tmp_path / "TREC.train").write_text("\n".join(lines), encoding="latin-1")
    shared = lines[3].replace(" ?", "  ?").replace("NUM:count", "NUM:other")
    (tmp_path / "TREC.test").write_text(f"{shared}\nHUM:ind Who ?\n", encoding="latin-1")
    splits = rows_by_split("trec", tmp_path)
    assert len(splits["test"]) == 2
    assert len(splits["train"]) + len(splits["validation"]) == 19
    (described,) = [task for task in summary(tmp_path) if task["name"] == "trec"]
    assert described["files"] == {"train": 20, "test": 2}
    assert described["num_removed"] == 1


def test_pairs_are_written_out_for_causal_models_and_kept_apart_for_encoders(
    data_dir: Path,
) -> None:
    causal = load_task("rte", "train", data_dir=data_dir, limit=1)[0]
    assert causal.prompt == "Premise: p 0\nHypothesis: h"
    assert (causal.choices, causal.answer, causal.response) == (("yes", "no"), 0, "yes")
    encoder = load_task("rte", "train", data_dir=data_dir, limit=1, task_type="SEQ_CLS")[0]
    assert (encoder.prompt, encoder.text_pair, encoder.label) == ("p 0", "h", "entailment")


def test_stsb_is_a_regression_or_a_choice_among_whole_numbers(data_dir: Path) -> None:
    rows = load_task("stsb", "train", data_dir=data_dir, limit=3)
    assert [(row.target, row.response) for row in rows] == [(0.0, "0"), (0.5, "1"), (1.0, "1")]
    rows = load_task("stsb", "train", data_dir=data_dir, limit=2, task_type="SEQ_CLS")
    assert [(row.kind, row.target, row.label) for row in rows] == [
        ("target", 0.0, None),
        ("target", 0.5, None),
    ]


def test_commonsense_choices_are_the_answers_that_the_instruction_names(data_dir: Path) -> None:
    (row,) = load_task("boolq", "test", data_dir=data_dir, limit=1)
    assert row.choices == ("the correct answer is true", "the correct answer is false")
    assert find_task("boolq").template == "{prompt}\n"


def test_an_input_follows_its_instruction(data_dir: Path) -> None:
    rows = file_rows("alpaca", "train", data_dir)
    assert rows[0].prompt == "Do 0"
    assert rows[1].prompt == "Do 1\n\n### Input:\nText 1"


def test_a_limit_keeps_the_first_rows_of_a_split(data_dir: Path) -> None:
    rows = load_task("trec", "test", data_dir=data_dir)
    assert load_task("trec", "test", data_dir=data_dir, limit=3) == rows[:3]


GOOD = choice_record(0, "true/false")
WRONG = {
    "trec, no question": ("trec", "TREC.train", "HUM:ind Who ?\nno-label\n", ":2: a line must be"),
    "trec, unknown label": ("trec", "TREC.train", "HUM:ind Who ?\n\nX:y Z ?\n", ":3: a line must"),
    "sst2, no tab": (
        "sst2",
        "dev.tsv",
        "sentence\tlabel\ngood 1\n",
        ":2: a line must be 'sentence<TAB>label'",
    ),
    "sst2, wrong label": (
        "sst2",
        "dev.tsv",
        "sentence\tlabel\ngood\t1\nbad\t2\n",
        ":3: a row must be sentence, label, the last 0 or 1",
    ),
    "sst2, no header": (
        "sst2",
        "dev.tsv",
        "a good film\t1\n",
        ":1: the header must name the columns sentence, label",
    ),
    "sst2, empty": ("sst2", "dev.tsv", "", ":1: the header must name"),
    "cola, too few cells": ("cola", "dev.tsv", "gj04\t1\t\tA.\ngj04\t1\n", ":2: a line must be"),
    "rte, unlabelled test file": (
        "rte",
        "dev.tsv",
        "index\tsentence1\tsentence2\n0\ta\tb\n",
        ":1: the header must name the columns sentence1, sentence2, label",
    ),
    "rte, too many cells": ("rte", "dev.tsv", f"{PAIR}\n0\ta\tb\tentailment\tx\n", ":2: a line"),
    "stsb, no number": (
        "stsb",
        "dev.tsv",
        "sentence1\tsentence2\tscore\na\tb\t4.5\na\tc\tfour\n",
        ":3: a row must be sentence1, sentence2, score, the last 0 to 5",
    ),
    "stsb, out of range": (
        "stsb",
        "dev.tsv",
        "sentence1\tsentence2\tscore\na\tb\t5.5\n",
        ":2: a row must be",
    ),
    "boolq, another answer": (
        "boolq",
        "test.json",
        json.dumps([GOOD, {**GOOD, "answer": "answer1"}], indent=1),
        ':8: a row must be {"instruction": "... Answer format: answer1/answer2"',
    ),
    "boolq, no object": ("boolq", "test.json", '[\n"x"\n]', ":2: a row must be"),
    "boolq, broken JSON": ("boolq", "test.json", '[\n{"instruction": \n]', ":3: must be valid"),
    "boolq, no comma": ("boolq", "test.json", "[\n{}\n{}]", ":2: a row must be"),
    "boolq, cut off": ("boolq", "test.json", f"[\n{json.dumps(GOOD)}", ":2: must be valid JSON"),
    "gsm8k, no mark": (
        "gsm8k",
        "test.jsonl",
        json.dumps(gsm8k_record(1)) + '\n{"question": "1?", "answer": "2"}\n',
        ':2: a row must be {"question": "...", "answer": "... #### 8"}',
    ),
    "gsm8k, broken JSON": ("gsm8k", "test.jsonl", '{"question"\n', ":1: must be valid JSON"),
    "mawps, no number": (
        "mawps",
        "testset.json",
        json.dumps([{**mawps_record(1), "ans": "many"}]),
        ":1: a row must be",
    ),
    "svamp, no number": (
        "svamp",
        "test.json",
        json.dumps([number_record(1), {**number_record(2), "answer": "two"}], indent=1),
        ":7: a row must be",
    ),
    "aqua, no such option": (
        "aqua",
        "test.json",
        json.dumps([{**aqua_record(1), "answer": "E"}]),
        ":1: a row must be",
    ),
    "ultrafeedback1k, no output": (
        "ultrafeedback1k",
        "ultrafeedback_1k.json",
        '{"instruction": "Do", "input": "", "output": ""}\n',
        ":1: a row must be",
    ),
    "boolq, no text file": ("boolq", "test.json", b"\xff\xfe[", "must be a readable UTF-8 file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    task, name, content, message = WRONG[case]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    split = {"dev.tsv": "validation", "TREC.train": "train"}.get(name, "test")
    split = "train" if task == "ultrafeedback1k" else split
    with pytest.raises(InputError) as caught:
        load_task(task, split, data_dir=tmp_path)
    assert message in str(caught.value)
    assert name in str(caught.value)


CONVERTERS = {
    f"{name} {i}": source.convert
    for name, task in TASKS.items()
    for i, source in enumerate((*task.local, task.hub))
    if source is not None
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_a_record_with_anything_in_its_columns_is_taken_or_refused(name: str) -> None:
    records = [record for record, *_ in HUB.values()]
    records += [choice_record(0, "true/false"), number_record(1), aqua_record(1), mawps_record(1)]
    odd: list[Any] = [None, 3, "text", [], {}]
    for record in records:
        for value in (None, "", "7", 7, True, 1.5, ["a"]):
            odd += [{**record, column: value} for column in record]
    for record in odd:
        with contextlib.suppress(InputError):
            assert CONVERTERS[name](record, "file:1").source == "file:1"


def test_broken_lines_of_qqp_are_left_out_with_a_warning(tmp_path: Path) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    lines = [f"{i}\t1\t2\tq {i}?\tr {i}?\t{i % 2}\n" for i in range(4)]
    (tmp_path / "dev.tsv").write_text(header + lines[0] + "1\t1\t2\tonly half\n" + "".join(lines))
    with pytest.warns(UserWarning, match=r"1 broken lines were left out, .*dev.tsv:3"):
        assert len(file_rows("qqp", "validation", tmp_path)) == 5


@pytest.mark.parametrize(
    ("name", "split", "files", "message"),
    [
        ("piqa", "train", ["piqa/test.json"], r"must be in train.json, .*commonsense170k as the"),
        ("piqa", "validation", ["piqa/test.json"], "must be in train.json"),
        ("aqua", "train", ["AQuA/test.json"], r"must be in train.json, .*train on math10k"),
        (
            "math10k",
            "test",
            ["ft-training_set/math_10k.json"],
            "to be tested on aqua, gsm8k, mawps, svamp$",
        ),
        ("sst2", "train", ["SST-2/dev.tsv"], r"must be in train.tsv, got none in '.*SST-2'; add"),
        ("trec", "train", [], r"must hold the files of trec, got .*; put TREC.train, TREC.test"),
    ],
)
def test_a_split_without_files_is_refused_with_what_it_needs(
    name: str, split: Any, files: list[str], message: str, data_dir: Path, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_bytes((data_dir / file).read_bytes())
    with pytest.raises(InputError, match=message):
        load_task(name, split, data_dir=tmp_path)


def test_one_of_two_missing_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "in_domain_dev.tsv").write_text("gj04\t1\t\tA.\n")
    with pytest.raises(InputError, match=r"out_of_domain_dev\.tsv"):
        load_task("cola", "validation", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "glue"}, "task must be one of commonsense170k, boolq, .*got 'glue'"),
        ({"split": "dev"}, "split must be one of train, validation, test, got 'dev'"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"data_dir": "no-such-directory"}, "data_dir must be an existing directory"),
        ({"name": "mawps", "data_dir": None}, "data_dir must be given for mawps, got none"),
        ({"name": "gsm8k", "task_type": "SEQ_CLS"}, "task_type must be CAUSAL_LM for gsm8k"),
    ],
)
def test_what_there_is_not_is_refused(
    arguments: dict[str, Any], message: str, data_dir: Path
) -> None:
    given = {"name": "trec", "split": "test", "data_dir": data_dir, **arguments}
    with pytest.raises(InputError, match=message):
        load_task(given.pop("name"), given.pop("split"), **given)


@pytest.mark.parametrize(
    ("name", "found"),
    [("SST-2", "sst2"), ("sts_b", "stsb"), ("ARC-e", "arc-easy"), ("OBQA", "openbookqa")],
)
def test_tasks_are_found_by_the_names_that_papers_write(name: str, found: str) -> None:
    assert find_task(name).name == found


def test_a_choice_written_out_is_the_same_question_with_its_options_as_responses(
    tmp_path: Path,
) -> None:
    record = {
        "instruction": "Please choose the correct answer to the question: Which: A or B?\n\n"
        "Answer1: an ice. Answer2: Answer4: fire Answer3: 3 Answer4: rain\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "output": "the correct answer is answer2",
        "answer": "answer2",
    }
    (tmp_path / "test.json").write_text(json.dumps([record]))
    for name in ("arc-easy", "arc-challenge", "openbookqa"):
        (row,) = load_task(f"{name}-cloze", "test", data_dir=tmp_path)
        assert row.prompt == "Which: A or B?"
        assert row.choices == ("an ice.", "Answer4: fire", "3", "rain")
        assert row.response == "Answer4: fire"
        assert find_task(f"{name}-cloze").template == "Question: {prompt}\nAnswer:"
    record["instruction"] = "Which?\n\nAnswer1: ice Answer3: fire\n\nAnswer format: answer1/answer2"
    (tmp_path / "test.json").write_text(json.dumps([record]))
    with pytest.raises(InputError, match=r"test\.json:1: a row must be"):
        load_task("arc-easy-cloze", "test", data_dir=tmp_path)


# Records as the hub has them, and the prompt and response that they become.
HUB = {
    "boolq": (
        {"question": "is it so", "passage": "...", "answer": True},
        "Please answer the following question with true or false, question: is it so?\n\n"
        "Answer format: true/false",
        "the correct answer is true",
    ),
    "piqa": (
        {"goal": "cool it", "sol1": "ice", "sol2": "fire", "label": 0},
        "Please choose the correct solution to the question: cool it\n\nSolution1: ice\n\n"
        "Solution2: fire\n\nAnswer format: solution1/solution2",
        "the correct answer is solution1",
    ),
    "siqa": (
        {
            "context": "A fell.",
            "question": "Why?",
            **{f"answer{letter}": letter for letter in "ABC"},
            "label": "3",
        },
        "Please choose the correct answer to the question: A fell. Why?\n\nAnswer1: A Answer2: B "
        "Answer3: C\n\nAnswer format: answer1/answer2/answer3",
        "the correct answer is answer3",
    ),
    "hellaswag": (
        {"activity_label": "Ice", "ctx": "He", "endings": ["a", "b", "c", "d"], "label": "3"},
        "Please choose the correct ending to complete the given sentence: Ice: He\n\nEnding1: a "
        "Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "the correct answer is ending4",
    ),
    "winogrande": (
        {"sentence": "_ won.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "_ won.\n\nOption1: Ann Option2: Bea\n\nAnswer format: option1/option2",
        "the correct answer is option2",
    ),
    "arc-easy": (
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "Please choose the correct answer to the question: Q?\n\nAnswer1: x Answer2: y\n\n"
        "Answer format: answer1/answer2",
        "the correct answer is answer2",
    ),
    "openbookqa": (
        {
            "question_stem": "Q",
            "choices": {"text": ["x", "y"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: Q\n\nAnswer1: x Answer2: y\n\n"
        "Answer format: answer1/answer2",
        "the correct answer is answer1",
    ),
    "arc-challenge-cloze": (
        {"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"},
        "Q?",
        "y",
    ),
    "gsm8k": (gsm8k_record(4), "4 and 1?", "<<4+1=5>>It is.\nThe final answer is: 5"),
    "aqua": (
        {"question": "Q?", "options": ["A)21", "B)22"], "rationale": "As 2.", "correct": "B"},
        "Q? Answer Choices: (A) 21 (B) 22",
        "As 2.\nThe answer is (B).",
    ),
    "svamp": (
        {"Body": "Ann has 5", "Question": "How many?", "Answer": "5.0"},
        "Ann has 5. How many?",
        "The answer is 5.",
    ),
    "alpaca": (alpaca_record(0), "Do 0", "Done 0"),
    "sst2": ({"sentence": "good ", "label": 1, "idx": 0}, "good", "positive"),
    "mnli": (
        {"premise": "p", "hypothesis": "h", "label": 2},
        "Premise: p\nHypothesis: h",
        "no",
    ),
    "qqp": (
        {"question1": "q", "question2": "r", "label": 0},
        "Question 1: q\nQuestion 2: r",
        "no",
    ),
    "stsb": (
        {"sentence1": "a", "sentence2": "b", "label": 3.5},
        "Sentence 1: a\nSentence 2: b",
        "4",
    ),
    "trec": ({"text": "Who ?", "coarse_label": 3, "fine_label": 4}, "Who ?", "human"),
}


@pytest.mark.parametrize("name", HUB)
def test_records_of_the_hub_become_the_same_rows(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, prompt, response = HUB[name]
    hub, asked = find_task(name).hub, set()

    def load_dataset(*arguments: Any, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.add((*arguments, revision, split))
        first, size = next(iter(record)), 400 if split == "train" else 6
        return [record, *({**record, first: f"{split} {i}"} for i in range(size))]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    splits = [load_task(name, split) for split in (SPLITS if hub.train else ("test",))]
    rows = [row for split in splits for row in split if row.prompt == prompt]
    assert {row.response for row in rows} == {response}
    assert rows[0].source.startswith(f"{hub.name}[")
    names = (*hub.train, *hub.validation, *hub.test)
    assert asked == {(hub.id, hub.config, hub.revision, split) for split in names}


def test_a_hub_that_cannot_be_read_asks_for_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_arguments: Any, **_options: Any) -> Any:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"data_dir must be given where .*no route to the hub"):
        load_task("gsm8k", "test")


@pytest.mark.parametrize("record", [{"question": "q"}, {"question": "q", "answer": "yes"}])
def test_a_wrong_record_of_the_hub_is_refused_with_its_row(
    record: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_arguments, **_options: [record])
    with pytest.raises(InputError, match=r"google/boolq\[train\], row 1: a row must be"):
        load_task("boolq", "test")


def test_every_task_names_metrics_and_extractors_that_there_are() -> None:
    for task in TASKS.values():
        assert {task.metric, *task.extra_metrics} <= set(METRICS)
        assert "{prompt}" in task.template
        if task.answer is not None:
            find_extractor(task.answer)


def test_the_command_lists_tasks_and_counts_rows(
    data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tasks", "--data-dir", str(data_dir), "--json"]) == 0
    listed = {task["name"]: task for task in json.loads(capsys.readouterr().out)["tasks"]}
    assert list(listed) == list(TASKS)
    keys = {"name", "family", "about", "metric", "scoring", "template", "splits", "hub"}
    assert all(keys <= set(task) for task in listed.values())
    assert listed["sst2"]["files"] == {"train": NUM_TRAIN, "validation": NUM_OTHER}
    assert listed["sst2"]["rows"] == {"train": NUM_TRAIN, "validation": 5, "test": 5}
    assert cli.main(["tasks"]) == 0
    assert "ultrafeedback1k" in capsys.readouterr().out


def test_the_command_names_a_wrong_file_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "TREC.test").write_text("nothing\n")
    (tmp_path / "test.jsonl").write_text(json.dumps(gsm8k_record(1)) + "\n")
    assert cli.main(["tasks", "--data-dir", str(tmp_path), "--json"]) == 0
    listed = {task["name"]: task for task in json.loads(capsys.readouterr().out)["tasks"]}
    assert "TREC.test:1" in listed["trec"]["error"]
    assert listed["gsm8k"]["rows"] == {"test": 1}


def test_tasks_need_no_torch() -> None:
    code = (
        "import sys, lowmem_reft.data.tasks.listing, lowmem_reft.runs.judge\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


PUBLIC = {
    "boolq": {"train": 9427, "test": 3270},
    "piqa": {"test": 1838},
    "siqa": {"test": 1954},
    "winogrande": {"test": 1267},
    "arc-easy": {"train": 2251, "test": 2376},
    "arc-challenge": {"train": 1119, "test": 1172},
    "openbookqa": {"train": 4957, "test": 500},
    "aqua": {"test": 254},
    "gsm8k": {"train": 7473, "test": 1319},
    "mawps": {"train": 1898, "validation": 237, "test": 238},
    "svamp": {"test": 1000},
    "ultrafeedback1k": {"train": 1000},
    "sst2": {"train": 67349, "validation": 872},
    "mrpc": {"train": 4076, "test": 1725},
    "cola": {"train": 8551, "validation": 1043},
    "rte": {"train": 2490, "validation": 277},
    "stsb": {"train": 5749, "validation": 1500},
    "trec": {"train": 5452, "test": 500},
}


@pytest.fixture(scope="module")
def public_dir() -> Path:
    directory = os.environ.get("LOWMEM_REFT_DATASETS")
    if not directory:
        pytest.skip("LOWMEM_REFT_DATASETS names no directory")
    return Path(directory)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_files_have_exactly_their_rows(name: str, public_dir: Path) -> None:
    counts = {split: len(file_rows(name, split, public_dir)) for split in PUBLIC[name]}
    assert counts == PUBLIC[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_splits_of_public_files_share_no_input(name: str, public_dir: Path) -> None:
    names = SPLITS if "train" in PUBLIC[name] else ("test",)
    splits = [inputs(load_task(name, split, data_dir=public_dir)) for split in names]
    assert all(splits)
    assert len(set().union(*splits)) == sum(map(len, splits))


@pytest.mark.parametrize("name", ["aqua", "gsm8k", "mawps", "svamp"])
def test_the_right_answer_is_found_in_every_public_response(name: str, public_dir: Path) -> None:
    find = find_extractor(find_task(name).answer)
    for split in PUBLIC[name]:
        for row in file_rows(name, split, public_dir):
            assert find(row.response) is not None, row.source


def test_the_answers_of_gsm8k_are_those_after_the_hash_marks(public_dir: Path) -> None:
    find = find_extractor("number")
    lines = (public_dir / "gsm8k/test.jsonl").read_text().splitlines()
    wanted = [json.loads(line)["answer"].rpartition("####")[2].replace(",", "") for line in lines]
    rows = file_rows("gsm8k", "test", public_dir)
    for row, answer in zip(rows, wanted, strict=True):
        assert answers_equal("number", find(row.response), answer.strip()), row.source
