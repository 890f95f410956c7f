from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft.data.rows import Row, load_rows, read_rows
from lowmem_reft.errors import InputError
from written import json_lines

USER = {"role": "user", "content": "Say hello."}
ANSWER = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "You help."}


def _load(tmp_path: Path, *records: Any, **options: Any) -> list[Row]:
    return load_rows(json_lines(tmp_path / "rows.jsonl", *records), **options)


PROMPTED = {
    "TRL": ({"prompt": "a", "completion": " b"}, ("a", " b")),
    "Alpaca": ({"instruction": "a", "input": "b", "output": "c"}, ("a\nb", "c")),
    "Alpaca without input": ({"instruction": "a", "input": "", "output": "c"}, ("a", "c")),
    "Dolly": ({"instruction": "a", "context": "b", "response": "c"}, ("a\nb", "c")),
    "question, answer": ({"question": "a", "answer": "b"}, ("a", "b")),
    "query, response": ({"query": "a", "response": "b"}, ("a", "b")),
    "input, output": ({"input": "a", "output": "b"}, ("a", "b")),
}


@pytest.mark.parametrize("name", PROMPTED)
def test_prompt_and_response_are_read_under_other_names(name: str, tmp_path: Path) -> None:
    record, expected = PROMPTED[name]
    (row,) = _load(tmp_path, record)
    assert (row.prompt, row.response) == expected
    asked = {key: value for key, value in record.items() if value != expected[1]}
    (row,) = _load(tmp_path, asked, require_response=False)
    assert (row.prompt, row.response, row.kind) == (expected[0], None, "prompt")


CHATS = {
    "messages": {"messages": [USER, ANSWER]},
    "conversations": {"conversations": [USER, ANSWER]},
    "ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Say hello."},
            {"from": "gpt", "value": "Hello."},
        ]
    },
    "TRL": {"prompt": [USER], "completion": [ANSWER]},
    "TRL, one text": {"prompt": [USER], "completion": "Hello."},
}


@pytest.mark.parametrize("name", CHATS)
def test_chats_are_read_under_other_names(name: str, tmp_path: Path) -> None:
    (row,) = _load(tmp_path, CHATS[name])
    assert (row.messages, row.response) == ((USER, ANSWER), "Hello.")


@pytest.mark.parametrize("record", [{"conversations": [USER]}, {"prompt": [USER]}], ids=list)
def test_chats_without_response_are_read_on_request(record: Any, tmp_path: Path) -> None:
    (row,) = _load(tmp_path, record, require_response=False)
    assert (row.messages, row.response) == ((USER,), None)


def test_an_empty_response_is_none_where_it_is_still_to_be_written(tmp_path: Path) -> None:
    (row,) = _load(tmp_path, {"instruction": "a", "output": ""}, require_response=False)
    assert (row.prompt, row.response) == ("a", None)
    with pytest.raises(InputError, match="output must be a non-empty string, got ''"):
        _load(tmp_path, {"instruction": "a", "output": ""})


def test_a_question_with_choices_is_a_choice_row(tmp_path: Path) -> None:
    (row,) = _load(tmp_path, {"question": "a", "choices": ["b", "c"], "answer": 1})
    assert (row.kind, row.prompt, row.response) == ("choices", "a", "c")


def test_a_system_column_is_the_system_message_of_a_chat(tmp_path: Path) -> None:
    record = {"messages": [USER, ANSWER], "system": "You help."}
    assert _load(tmp_path, record)[0].messages == (SYSTEM, USER, ANSWER)
    record["messages"] = [SYSTEM, USER, ANSWER]
    assert _load(tmp_path, record)[0].messages == (SYSTEM, USER, ANSWER)
    with pytest.raises(InputError, match=r"rows.jsonl:1: system must be the chat's only system"):
        _load(tmp_path, {**record, "system": "You do not help."})


def test_prompts_with_a_system_column_are_chats_all_of_a_source(tmp_path: Path) -> None:
    rows = _load(
        tmp_path,
        {"instruction": "Say hello.", "output": "Hello.", "system": "You help."},
        {"instruction": "Say hello.", "output": "Hello.", "system": ""},
    )
    assert [row.messages for row in rows] == [(SYSTEM, USER, ANSWER), (USER, ANSWER)]
    (row,) = _load(
        tmp_path, {"prompt": "Say hello.", "system": "You help."}, require_response=False
    )
    assert (row.messages, row.response) == ((SYSTEM, USER), None)


def test_history_stands_before_the_prompt_of_a_chat(tmp_path: Path) -> None:
    record = {"instruction": "Say hello.", "output": "Hello.", "history": [["a", "b"]]}
    (row,) = _load(tmp_path, record)
    assert [turn["content"] for turn in row.messages] == ["a", "b", "Say hello.", "Hello."]
    with pytest.raises(InputError, match=r"history must be a list of \[question, answer\] pairs"):
        _load(tmp_path, {**record, "history": ["a"]})


def test_a_chat_template_is_given_tools_documents_and_its_own_arguments(tmp_path: Path) -> None:
    arguments = {
        "tools": '[{"name": "weather"}]',
        "documents": [{"text": "a", "title": None}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (row,) = _load(tmp_path, {"messages": [USER, ANSWER], **arguments})
    assert row.template_arguments == {
        "enable_thinking": False,
        "tools": [{"name": "weather"}],
        "documents": [{"text": "a"}],
    }
    (row,) = _load(tmp_path, {"prompt": [USER], "completion": [ANSWER], **arguments})
    assert list(row.template_arguments) == ["enable_thinking", "tools", "documents"]


def test_no_tools_are_none_and_tools_may_be_among_the_arguments(tmp_path: Path) -> None:
    for tools in ("[]", [], "", None):
        (row,) = _load(tmp_path, {"messages": [USER, ANSWER], "tools": tools})
        assert row.template_arguments == {}
    record = {"messages": [USER, ANSWER], "chat_template_kwargs": {"tools": '[{"name": "x"}]'}}
    assert _load(tmp_path, record)[0].template_arguments == {"tools": [{"name": "x"}]}
    with pytest.raises(InputError, match="tools must be given once, got a column and one in"):
        _load(tmp_path, {**record, "tools": [{"name": "y"}]})


BAD_ARGUMENTS = {
    "tools": ("weather", "tools: must be valid JSON"),
    "documents": ([1], "documents must be a list of objects"),
    "chat_template_kwargs": (
        {"tokenize": True},
        "chat_template_kwargs must be for the template, got 'tokenize'",
    ),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_what_a_chat_template_cannot_be_given_is_an_error_with_line(
    name: str, tmp_path: Path
) -> None:
    value, message = BAD_ARGUMENTS[name]
    with pytest.raises(InputError, match=rf"rows\.jsonl:1: {message}"):
        _load(tmp_path, {"messages": [USER, ANSWER], name: value})


def test_columns_that_nothing_reads_are_named_once_in_one_line(tmp_path: Path) -> None:
    record = {"prompt": "a", "response": "b", "id": 3, "note": "", "empty": None}
    with pytest.warns(UserWarning, match=r"rows\.jsonl: columns that are ignored: id, tools$") as w:
        _load(tmp_path, record, {**record, "tools": [{"name": "x"}]})
    assert len(w) == 1
    read = read_rows(tmp_path / "rows.jsonl")
    assert (read.columns, read.ignored) == (("prompt", "response"), ("id", "tools"))


def test_columns_that_are_read_are_not_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _load(tmp_path, {"text": "a", "text_pair": "b", "label": 1})
        _load(tmp_path, {"prompt": "a", "choices": ["b", "c"], "answer": 0, "target": 1.0})


def test_choices_that_differ_in_spaces_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:1: choices must be different, got 'b'"):
        _load(tmp_path, {"prompt": "a", "choices": ["b", " b"], "answer": 0})


def test_whole_numbers_may_be_floats(tmp_path: Path) -> None:
    (row,) = _load(tmp_path, {"prompt": "a", "choices": ["b", "c"], "answer": 1.0})
    assert (row.answer, row.response) == (1, "c")
    assert _load(tmp_path, {"text": "a", "label": 1.0})[0].label == "1"
