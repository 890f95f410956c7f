from __future__ import annotations

from typing import Any

from lowmem_reft.data import split_turns
from lowmem_reft.data.rows import Row
from lowmem_reft.data.turns import of_turns


def _said(*turns: str) -> list[dict[str, Any]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn} for turn in turns]


def _chat(*turns: str) -> Row:
    return Row(source="chats.jsonl:2", messages=tuple(_said(*turns)), response=turns[-1])


def test_each_answer_is_a_row_after_all_that_comes_before_it() -> None:
    row = _chat("s", "u1", "a1", "u2", "a2")
    first, second = of_turns([row], "all")
    assert (first.messages, first.response) == (row.messages[:3], "a1")
    assert first.source == "chats.jsonl:2, message 3"
    assert second == row
    assert of_turns([row], "last") == [row]


def test_an_answer_before_any_question_and_one_of_weight_zero_are_not_trained() -> None:
    row = _chat("a0", "u1", "a1", "u2", "a2")
    row.messages[2]["weight"] = 0
    assert of_turns([row], "all") == [row]


def test_rows_of_other_kinds_stay_as_they_are() -> None:
    row = Row(source="rows.jsonl:1", prompt="Who?", response="I")
    assert of_turns([row], "all") == [row]


def test_records_are_split_for_other_trainers() -> None:
    chat = _said("u1", "a1", "u2", "a2")
    records = [{"messages": chat, "id": 7}, {"prompt": "Who?", "completion": "I"}]
    assert split_turns(records) == [
        {"id": 7, "prompt": chat[:1], "completion": chat[1:2]},
        {"id": 7, "prompt": chat[:3], "completion": chat[3:]},
        records[1],
    ]
