from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from lowmem_reft.data.rows import load_rows
from lowmem_reft.errors import InputError

RECORDS = [
    {"prompt": "Hello cat.", "response": "Hello dog."},
    {"prompt": "Où est le café ?", "response": "Là; en bas."},
]
PAIRS = [(record["prompt"], record["response"]) for record in RECORDS]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def _pairs(path: Path, **options: Any) -> list[tuple[str, str | None]]:
    return [(row.prompt, row.response) for row in load_rows(path, **options)]


SHAPES = {
    "list on one line": json.dumps(RECORDS),
    "list, indented": json.dumps(RECORDS, indent=2),
    "objects, indented": "\n".join(json.dumps(record, indent=2) for record in RECORDS),
    "in an object": json.dumps({"data": RECORDS}),
    "in an object, indented": json.dumps({"examples": RECORDS}, indent=1),
    "columns of lists": json.dumps({key: [r[key] for r in RECORDS] for key in RECORDS[0]}),
    **{
        f"pandas, {orient}": pd.DataFrame(RECORDS).to_json(orient=orient)
        for orient in ("columns", "index", "split", "records")
    },
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson"])
@pytest.mark.parametrize("shape", SHAPES)
def test_json_of_every_shape_gives_its_rows(shape: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_text(SHAPES[shape], encoding="utf-8")
    assert _pairs(path) == PAIRS


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LONE_ROWS = [
    {"messages": CHAT},
    {"messages": CHAT, "tools": [{"name": "weather"}]},
    {"conversations": CHAT},
    {"prompt": CHAT[:1], "completion": CHAT[1:]},
    {"prompt": "a", "choices": ["b", "c"], "answer": 0},
]


@pytest.mark.parametrize("record", LONE_ROWS, ids=list)
def test_a_file_of_one_row_is_no_object_of_columns(record: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(record))
    (row,) = load_rows(path)
    assert row.source == f"{path}:1"


def test_columns_of_chats_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"messages": [CHAT, CHAT]}))
    assert [row.messages for row in load_rows(path)] == [tuple(CHAT)] * 2


def test_of_several_lists_the_one_of_the_split_is_read_and_the_others_are_named(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": RECORDS, "test": RECORDS[1:], "version": 1}))
    with pytest.warns(UserWarning, match="those of 'test'; .* ignored: train, version$"):
        assert _pairs(path, split="test") == PAIRS[1:]
    with pytest.raises(InputError, match="one of the split 'dev', got the lists train, test"):
        load_rows(path, split="dev")


def test_the_place_of_a_row_is_the_line_that_it_begins_in(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + "\n".join(json.dumps(record, indent=2) for record in RECORDS))
    assert [row.source for row in load_rows(path)] == [f"{path}:2", f"{path}:6"]


BROKEN = {
    "repeated.jsonl": (LINES + '{"prompt": "a", "prompt": "b"}\n', r"3: .*every key once, got 'pr"),
    "nested.jsonl": (
        '{"messages": [{"role": "a", "role": "b"}]}',
        "1: .*every key once, got 'role",
    ),
    "repeated.json": ('[\n{"prompt": "a"},\n{"x": 1, "x": 2}\n]', "3: .*every key once, got 'x'"),
    "first.jsonl": ('{"prompt": "a"\n' + LINES, "1: must be valid JSON"),
    "indented.json": ('{\n"prompt": "a",\n"response" 1}', "3: must be valid JSON"),
    "cut.jsonl": (LINES + '{"prompt": "a", "resp', "3: must be valid JSON"),
    "digits.jsonl": ('{"a": 1' + "0" * 5000 + "}", "1: must be valid JSON"),
    "deep.json": ("[" * 100_000, "1: must be valid JSON"),
    "text.json": ('"rows"', "1: a row must be a JSON object, got str"),
    "lengths.json": (
        '{"prompt": ["a", "b"], "response": ["c"]}',
        " columns must have the same rows",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_json_is_an_error_with_file_and_line(name: str, tmp_path: Path) -> None:
    text, message = BROKEN[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name}:{message}"):
        load_rows(tmp_path / name)


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.JSONL.bz2", "rows.json.XZ", "rows.csv.gz"])
def test_compressed_files_are_read(name: str, tmp_path: Path) -> None:
    compress = {"gz": gzip, "bz2": bz2, "XZ": lzma}[name.rpartition(".")[2]].compress
    text = LINES if "csv" not in name else 'prompt,response\n"Hello cat.",Hello dog.\n'
    (tmp_path / name).write_bytes(compress(text.encode()))
    assert _pairs(tmp_path / name)[0] == PAIRS[0]


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.csv.gz", "no.jsonl.gz", "no.jsonl.xz"])
def test_a_broken_compressed_file_is_an_error_that_names_it(name: str, tmp_path: Path) -> None:
    content = gzip.compress(LINES.encode())[:-20] if name.startswith("cut") else b"no such file"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"data must be a readable file, got .*{name}"):
        load_rows(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_may_be_in_other_encodings_of_unicode(encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(RECORDS, ensure_ascii=False).encode(encoding))
    assert _pairs(path) == PAIRS


def test_line_separators_of_unicode_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    odd = [{"prompt": f"a{mark}b", "response": "c"} for mark in "\u2028\u2029\x85\x1c"]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in odd))
    assert [prompt for prompt, _ in _pairs(path)] == [record["prompt"] for record in odd]


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.Csv"])
def test_suffixes_may_be_in_upper_case(name: str, tmp_path: Path) -> None:
    text = LINES if "JSON" in name else "prompt,response\nHello cat.,Hello dog.\n"
    (tmp_path / name).write_text(text)
    assert _pairs(tmp_path / name)[0] == PAIRS[0]


def test_whole_numbers_that_pandas_made_floats_are_whole_in_parquet_files(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [1, 0, None]})
    frame[:2].to_parquet(tmp_path / "rows.parquet")
    assert [row.label for row in load_rows(tmp_path / "rows.parquet")] == ["1", "0"]


def test_what_json_has_not_is_an_error_with_the_row(tmp_path: Path) -> None:
    chat = [{**CHAT[0], "at": pd.Timestamp(0)}, CHAT[1]]
    pd.DataFrame({"messages": [chat]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InputError, match=r"row 1: messages\[0\].at must be text, a number"):
        load_rows(tmp_path / "rows.parquet")
