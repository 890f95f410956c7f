"""A prompt that is too long keeps its frame: template, system message, and the end of the text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from lowmem_reft.data.cutting import RowsTooLongError, encode_those_that_fit
from lowmem_reft.data.rows import Row
from lowmem_reft.data.tokens import (
    encode_all_choices,
    encode_labelled,
    encode_prompts,
    encode_rows,
)
from made_tokenizers import (
    CHAT_TEMPLATE,
    TEMPLATE,
    byte_level_tokenizer,
    metaspace_tokenizer,
)

SYSTEM = {"role": "system", "content": "what a day"}
ROLES = ("user", "assistant")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = byte_level_tokenizer(bos=True, eos="<|end|>")
    tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    return tokenizer


def chat(*contents: str) -> Row:
    turns = [{"role": ROLES[n % 2], "content": content} for n, content in enumerate(contents)]
    return Row(source="a:1", messages=(SYSTEM, *turns), response=contents[-1])


def prompt_of(row: Row, tokenizer: Any, **how: Any) -> list[int]:
    (example,) = encode_rows([row], tokenizer, **how).examples
    return example["input_ids"][: example["labels"].count(-100)]


def test_a_chat_of_one_turn_keeps_its_system_message_and_what_is_around_the_text(
    tokenizer: Any,
) -> None:
    row = chat("hello " * 60 + "what was it", "positive")
    prompt = prompt_of(row, tokenizer, max_length=60)
    text = tokenizer.decode(prompt)
    assert text.startswith("<s><|system|>what a day<|end|>\n<|user|>")
    assert text.endswith("hello what was it<|end|>\n<|assistant|>")
    assert len(encode_rows([row], tokenizer, max_length=60).examples[0]["input_ids"]) == 60
    asked = replace(row, messages=row.messages[:-1], response=None)
    (again,) = encode_prompts([asked], tokenizer, max_length=len(prompt)).examples
    assert again["input_ids"] == prompt


def test_the_oldest_turns_of_a_chat_give_way_first(tokenizer: Any) -> None:
    row = chat("hello there", "positive", "what is a set", "negative", "was it good", "ok")
    for kept in (row.messages[3:], row.messages[5:]):
        shorter = replace(row, messages=(SYSTEM, *kept))
        (whole,) = encode_rows([shorter], tokenizer).examples
        size = len(whole["input_ids"])
        for max_length in (size, size + 2):
            encoded = encode_rows([row], tokenizer, max_length=max_length)
            assert encoded.examples == [whole]
            assert encoded.num_cut_prompts == 1


def test_a_template_stays_around_a_prompt() -> None:
    for make in (byte_level_tokenizer, metaspace_tokenizer):
        for bos in (False, True):
            tokenizer = make(bos=bos)
            row = Row(source="a:1", prompt="was it good " * 30 + "or not?", response="positive")
            prompt = prompt_of(row, tokenizer, template=TEMPLATE, max_length=60)
            text = tokenizer.decode(prompt).removeprefix("<s>").strip()
            assert text.startswith("Question:")
            assert text.endswith("or not?\nAnswer:") or text.endswith("or not?<unk>Answer:")


def test_a_row_whose_frame_does_not_fit_is_refused_or_left_out(tokenizer: Any) -> None:
    rows = [chat("hello " * 60, "positive"), chat("a", "b")]
    encode = partial(encode_rows, tokenizer=tokenizer, max_length=40)
    size = len(prompt_of(chat("h", "positive"), tokenizer))
    assert encode(rows).num_cut_prompts == 1
    rows[0] = replace(
        rows[0], messages=({**SYSTEM, "content": "what a day " * 20}, *rows[0].messages[1:])
    )
    with pytest.raises(RowsTooLongError, match=r"a:1: response must leave .* needs \d{2,3} wi"):
        encode(rows)
    drop = partial(encode, long_rows="drop")
    with pytest.warns(UserWarning, match=r"1 of 2 rows were left out.* longest has \d{3}$"):
        kept, _ = encode_those_that_fit(rows, drop, long_rows="drop")
    assert kept == rows[1:]
    with pytest.raises(RowsTooLongError, match=r"raise max_length \(to \d+ for all\)$"):
        encode_prompts([replace(rows[0], response=None)], tokenizer, max_length=size)


def test_nothing_is_cut_where_long_rows_are_left_out(tokenizer: Any) -> None:
    long, choices = "hello " * 60, ("positive", "was it " * 30)
    asked = Row(source="a:1", prompt=long, response="positive")
    chosen = Row(source="a:2", prompt="what", response=choices[0], choices=choices, answer=0)
    text = Row(source="a:3", prompt=long, label="b")
    for encode, row in (
        (encode_rows, asked),
        (encode_rows, chat(long, "positive", "what", "negative")),
        (encode_prompts, asked),
        (encode_all_choices, replace(chosen, prompt=long)),
        (encode_all_choices, chosen),
        (partial(encode_labelled, label_names=["a", "b"]), text),
    ):
        short = replace(
            row, source="a:9", prompt="a", messages=(), choices=row.choices and ("a", "b")
        )
        dropping = partial(encode, tokenizer=tokenizer, max_length=40, long_rows="drop")
        with pytest.warns(UserWarning, match=r"^1 of 2 rows were left out, .* longest has \d+$"):
            kept, encoded = encode_those_that_fit([row, short], dropping, long_rows="drop")
        assert kept == [short]
        assert encoded == dropping([short])
        with pytest.raises(RowsTooLongError, match=r":\d: a row must have at most max_length 40 "):
            encode_those_that_fit([row], dropping, long_rows="drop")
