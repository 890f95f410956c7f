from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from lowmem_reft.data.chats import is_trained
from lowmem_reft.data.rows import Row, as_records, load_rows, rows_digest, write_rows
from lowmem_reft.errors import InputError
from written import json_lines

USER = {"role": "user", "content": "Is it warm in Rome?"}
ANSWER = {"role": "assistant", "content": "It is."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOOL = {"role": "tool", "content": "21"}


def _chat(tmp_path: Path, *messages: Any, **columns: Any) -> Row:
    (row,) = load_rows(json_lines(tmp_path / "rows.jsonl", {"messages": messages, **columns}))
    return row


def _call(arguments: Any, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}, **more}


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}], ids=str)
def test_a_turn_that_calls_a_tool_needs_no_content(content: Any, tmp_path: Path) -> None:
    calling = {"role": "assistant", "tool_calls": [CALL], **content}
    row = _chat(tmp_path, USER, calling, TOOL, ANSWER)
    assert row.messages == (USER, CALLING, TOOL, ANSWER)


def test_a_call_of_a_tool_may_be_the_response(tmp_path: Path) -> None:
    row = _chat(tmp_path, USER, {"role": "assistant", "content": None, "tool_calls": [CALL]})
    assert row.prompt_messages == [USER]
    assert row.response == '{"name": "weather", "arguments": {"city": "Rome"}}'
    row = _chat(tmp_path, USER, {**CALLING, "content": "I look."})
    assert str(row.response).startswith('I look.\n{"name"')


@pytest.mark.parametrize(
    "calls",
    [
        [_call('{"city": "Rome"}')],
        json.dumps([CALL]),
        [{"name": "weather", "arguments": {"city": "Rome"}}],
        CALL,
    ],
    ids=["arguments as text", "calls as text", "no function", "one call"],
)
def test_calls_of_tools_are_objects_however_they_are_written(calls: Any, tmp_path: Path) -> None:
    row = _chat(tmp_path, USER, {"role": "assistant", "tool_calls": calls}, TOOL, ANSWER)
    assert row.messages[1] == CALLING


def test_the_former_function_call_is_a_call_of_a_tool(tmp_path: Path) -> None:
    former = {"name": "weather", "arguments": '{"city": "Rome"}'}
    row = _chat(tmp_path, USER, {"role": "assistant", "content": None, "function_call": former})
    assert row.messages[1] == CALLING


def test_no_calls_and_no_arguments_are_none(tmp_path: Path) -> None:
    assert _chat(tmp_path, USER, {**ANSWER, "tool_calls": []}).messages[1] == ANSWER
    row = _chat(tmp_path, USER, {"role": "assistant", "tool_calls": [_call("")]})
    assert row.messages[1]["tool_calls"] == [_call({})]


BAD_MESSAGES = {
    "arguments are no object": (
        [USER, {**CALLING, "tool_calls": [_call('"Rome"')]}],
        r"messages\[1\].tool_calls\[0\].arguments must be a JSON object, got",
    ),
    "arguments are no JSON": (
        [USER, {**CALLING, "tool_calls": [_call("{city}")]}],
        r"messages\[1\].tool_calls\[0\].arguments: must be valid JSON",
    ),
    "a call without a name": ([USER, {**CALLING, "tool_calls": [{"id": "c"}]}], "with a name"),
    "an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ANSWER],
        r"messages\[0\].content\[0\] must be text, got a part of type 'image_url'",
    ),
    "an object as content": ([{**USER, "content": {"a": 1}}, ANSWER], "content must be a non-empt"),
    "a user without content": ([{"role": "user", "content": None}, ANSWER], "content must be"),
    "an answer without anything": ([USER, {"role": "assistant"}], r"messages\[1\].content must be"),
    "half a weight": ([USER, {**ANSWER, "weight": 0.5}], "weight must be 0 or 1, got 0.5"),
    "nothing to train": ([USER, {**ANSWER, "train": False}], "one of the assistant's to train"),
    "an unknown speaker": ([{"from": "narrator", "value": "a"}], "from must be one of human, user"),
    "half a character": ([{**USER, "name": "\ud800"}, ANSWER], "name must be valid Unicode"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_wrong_message_is_an_error_with_line_and_place(name: str, tmp_path: Path) -> None:
    messages, message = BAD_MESSAGES[name]
    path = json_lines(tmp_path / "rows.jsonl", {"messages": [USER, ANSWER]}, {"messages": messages})
    with pytest.raises(InputError, match=rf"rows\.jsonl:2: .*{message}"):
        load_rows(path)


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "Is it "}, {"type": "text", "text": "warm in Rome?"}],
        [{"type": "text", "text": "Is it warm in Rome?", "image_url": None}],
        ["Is it warm in Rome?"],
    ],
    ids=["two", "with a null", "a string"],
)
def test_content_of_text_parts_is_their_text(parts: Any, tmp_path: Path) -> None:
    assert _chat(tmp_path, {"role": "user", "content": parts}, ANSWER).messages[0] == USER


def test_nulls_are_missing_keys_at_any_depth_and_for_every_format(tmp_path: Path) -> None:
    calls = [_call({"city": "Rome"}), _call({"a": {"b": 1}, "c": [{"d": 2}]})]
    tools = [{"name": "weather", "parameters": {"city": {"type": "string"}}}, {"name": "sum"}]
    records = [
        {"messages": [USER, {**CALLING, "tool_calls": [call]}, TOOL, ANSWER], "tools": [tool]}
        for call, tool in zip(calls, tools, strict=True)
    ]
    Dataset.from_list(records).to_parquet(tmp_path / "rows.parquet")
    rows = load_rows(tmp_path / "rows.parquet")
    assert [row.messages[1]["tool_calls"] for row in rows] == [[call] for call in calls]
    assert [row.template_arguments for row in rows] == [{"tools": [tool]} for tool in tools]
    lines = load_rows(json_lines(tmp_path / "rows.jsonl", *records))
    assert rows_digest(lines) == rows_digest(rows)


def test_a_null_in_arguments_that_are_text_stays_also_when_rows_are_written(
    tmp_path: Path,
) -> None:
    calling = {**CALLING, "tool_calls": [_call('{"city": null}')]}
    tool = {"name": "weather", "default": None}
    row = _chat(tmp_path, USER, calling, tools=json.dumps([tool]), chat_template_kwargs={"a": 1})
    assert row.messages[1]["tool_calls"] == [_call({"city": None})]
    assert row.template_arguments == {"tools": [tool], "a": 1}
    (again,) = load_rows(write_rows(tmp_path / "again.jsonl", [row]))
    assert rows_digest([again]) == rows_digest([row])


def test_rows_with_tools_are_written_as_they_were_read(tmp_path: Path) -> None:
    record = {
        "messages": [USER, CALLING],
        "tools": [{"name": "weather"}],
        "documents": [{"title": "Rome", "text": "It is warm."}],
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (row,) = load_rows(json_lines(tmp_path / "rows.jsonl", record))
    assert as_records([row]) == [record]


def test_the_last_message_that_may_be_trained_is_the_response(tmp_path: Path) -> None:
    first = {**ANSWER, "weight": 1}
    row = _chat(tmp_path, USER, first, USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 0})
    assert row.messages == (USER, first)
    row = _chat(tmp_path, USER, {**ANSWER, "train": False}, USER, ANSWER)
    assert [is_trained(turn) for turn in row.messages] == [True, False, True, True]


def test_sharegpt_messages_have_roles_and_content(tmp_path: Path) -> None:
    turns = [
        ("system", "You help."),
        ("human", USER["content"]),
        ("function_call", '{"name": "weather", "arguments": {"city": "Rome"}}'),
        ("observation", "21"),
        ("gpt", "It is."),
    ]
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    (row,) = load_rows(json_lines(tmp_path / "rows.jsonl", record))
    system = {"role": "system", "content": "You help."}
    assert row.messages == (system, USER, CALLING, TOOL, ANSWER)
    assert row.response == "It is."
