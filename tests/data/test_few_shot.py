"""Solved examples before a prompt: which are drawn, how they are written, which are dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lowmem_reft.data.few_shot import draw_examples, separator, with_examples
from lowmem_reft.data.rows import Row, rows_digest
from lowmem_reft.data.tokens import encode_choices, encode_prompts, encode_rows
from lowmem_reft.errors import InputError
from made_tokenizers import CHAT_TEMPLATE, byte_level_tokenizer

TEMPLATE = r"Q: {prompt}\nA:"
EVEN = [
    Row(
        source=f"train.jsonl:{i}",
        prompt=f"{i} is",
        choices=("even", "odd"),
        answer=int(i % 10 == 0),
        response=("even", "odd")[int(i % 10 == 0)],
    )
    for i in range(40)
]
SUMS = [Row(source=f"train.jsonl:{i}", prompt=f"{i}+{i}", response=str(2 * i)) for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_level_tokenizer(bos=True, eos="<|end|>")
    tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    return tokenizer


def told(content: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(*said: str, system: str | None = None, **more: Any) -> Row:
    turns = [told(text, ("user", "assistant")[i % 2]) for i, text in enumerate(said)]
    head = [] if system is None else [told(system, "system")]
    return Row(source="chat", messages=(*head, *turns), response=said[-1], **more)


def before(rows: list[Row], examples: list[Row], tokenizer: Any, **how: Any) -> list[Row]:
    how = {"template": TEMPLATE, "joint": "auto", "max_length": 10**6, **how}
    return with_examples(rows, examples, tokenizer, **how)[0]


# --- which are drawn


def test_the_same_seed_draws_the_same_examples_and_another_one_others() -> None:
    draws = [draw_examples(SUMS, 4, seed=seed) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len({tuple(row.source for row in draw) for draw in draws}) == 3
    assert all(len({row.prompt for row in draw}) == 4 for draw in draws)


@pytest.mark.parametrize("num", [1, 2, 5, 6, 8])
def test_right_choices_are_as_often_each_as_they_can_be(num: int) -> None:
    for seed in range(5):
        drawn = Counter(row.answer for row in draw_examples(EVEN, num, seed=seed))
        assert abs(drawn[0] - drawn[1]) <= 1
    # There are four odd ones: beyond them the others are taken.
    assert Counter(row.answer for row in draw_examples(EVEN, 20, seed=0)) == {0: 16, 1: 4}


def test_the_order_does_not_tell_the_answers() -> None:
    orders = {tuple(row.answer for row in draw_examples(EVEN, 4, seed=s)) for s in range(40)}
    assert len(orders) == 6


def test_rows_that_are_validated_or_tested_on_are_never_drawn_nor_is_one_twice() -> None:
    held_out = [Row(source="test", prompt=row.prompt, response="?") for row in SUMS[:6]]
    drawn = draw_examples([*SUMS, *SUMS], 3, seed=0, without=held_out)
    assert sorted(row.prompt for row in drawn) == ["6+6", "7+7", "8+8"]
    with pytest.raises(InputError, match=r"few_shot must be at most 3, .* got 4; lower it"):
        draw_examples([*SUMS, *SUMS], 4, seed=0, without=held_out)
    chats = [chat("a", "b", system="s"), chat("d", "e", system="s"), chat("d", "f")]
    assert draw_examples(chats, 1, seed=0, without=[chat("a", "z")]) == chats[1:2]


def test_a_chat_is_not_shown_if_any_of_its_turns_is_held_out() -> None:
    long, other = chat("a", "b", "c", "d"), chat("e", "f")
    # What is asked first in a held-out chat is scored too, where all turns are.
    for held_out, drawn in (
        (chat("a", "z"), long),
        (chat("a", "b", "c", "z"), long),
        (long, chat("a", "b")),
    ):
        with pytest.raises(InputError, match="few_shot must be at most 1"):
            draw_examples([drawn, other], 2, seed=0, without=[held_out])


def test_the_same_question_is_known_by_its_text_and_its_choices() -> None:
    spaced = Row(source="test", prompt=" 0+0 ", response="0")
    with pytest.raises(InputError, match="few_shot must be at most 8"):
        draw_examples(SUMS, 9, seed=0, without=[spaced])
    which = [
        Row(source=f"t:{i}", prompt="Which?", choices=(f"{i}", "x"), answer=0, response=f"{i}")
        for i in range(4)
    ]
    assert len(draw_examples(which, 3, seed=0, without=which[:1])) == 3
    turned = replace(which[1], choices=which[1].choices[::-1])
    with pytest.raises(InputError, match="few_shot must be at most 3"):
        draw_examples(which, 4, seed=0, without=[turned])


# --- how they are written


def test_examples_are_the_text_that_training_has_and_the_prompt_follows(tokenizer: Any) -> None:
    rows = before(SUMS[4:6], SUMS[:2], tokenizer)
    expected = "Q: 0+0\nA: 0\n\nQ: 1+1\nA: 2\n\nQ: 4+4\nA:"
    (encoded, _) = encode_prompts(rows, tokenizer, template=TEMPLATE, max_length=999).examples
    assert tokenizer.decode(encoded["input_ids"]) == "<s>" + expected
    trained = encode_rows(SUMS[:2], tokenizer, template=TEMPLATE).examples
    written = [tokenizer.decode(e["input_ids"], skip_special_tokens=True) for e in trained]
    assert expected.startswith("\n\n".join(written))


def test_the_responses_are_those_without_examples(tokenizer: Any) -> None:
    (row,) = before(EVEN[:1], EVEN[7:10], tokenizer)
    plain, shown = (encode_choices(r, tokenizer, template=TEMPLATE) for r in (EVEN[0], row))
    for one, other in zip(plain.examples, shown.examples, strict=True):
        responses = [[i for i in e["labels"] if i != -100] for e in (one, other)]
        assert responses[0] == responses[1]
    assert (row.prompt, row.source) == (EVEN[0].prompt, EVEN[0].source)


def test_a_longer_gap_stands_between_examples_that_have_one_themselves(tokenizer: Any) -> None:
    gapped = Row(source="x", prompt="a", response="b\n\nc\n\n\nd")
    assert separator(SUMS) == "\n\n"
    assert separator([gapped]) == "\n\n\n\n"
    (row,) = before(SUMS[:1], [gapped], tokenizer)
    assert row.before == "Q: a\nA: b\n\nc\n\n\nd\n\n\n\n"


def test_examples_of_chats_are_earlier_turns_under_the_rows_own_system_message(
    tokenizer: Any,
) -> None:
    examples = [chat("a", "b", system="other"), chat("c", "d", "e", "f")]
    (row,) = before([chat("q", "r", system="mine")], examples, tokenizer)
    assert row.messages == chat("a", "b", "c", "d", "e", "f", "q", "r", system="mine").messages
    (plain,) = before([chat("q", "r")], examples, tokenizer)
    assert plain.messages == chat("a", "b", "c", "d", "e", "f", "q", "r").messages
    (encoded,) = encode_prompts([plain], tokenizer).examples
    text = tokenizer.apply_chat_template(
        plain.prompt_messages, tokenize=False, add_generation_prompt=True
    )
    assert tokenizer.decode(encoded["input_ids"]) == text.rstrip(" ")


# --- which are dropped


def test_examples_are_dropped_from_the_front_until_the_prompt_fits(tokenizer: Any) -> None:
    long = Row(source="x", prompt="9" * 18, response="18")
    rows, examples = [SUMS[4], long, Row(source="y", prompt="8" * 200, response="1")], SUMS[:3]
    sizes = {
        num: len(encode_rows(before(rows[:1], examples[3 - num :], tokenizer), tokenizer,
                             template=TEMPLATE, max_length=999).examples[0]["input_ids"])
        for num in (1, 2, 3)
    }  # fmt: skip
    found, counts = with_examples(
        rows, examples, tokenizer, template=TEMPLATE, joint="auto", max_length=sizes[3]
    )
    assert counts[0] == 3
    assert counts[1] in (1, 2)
    assert counts[2] == 0
    assert found[1] == before([long], examples[3 - counts[1] :], tokenizer)[0]
    assert found[2] == rows[2]
    whole = encode_rows(found[:2], tokenizer, template=TEMPLATE, max_length=sizes[3])
    assert whole.num_cut_prompts == 0
    more = before([long], examples[2 - counts[1] :], tokenizer)
    assert encode_rows(more, tokenizer, template=TEMPLATE, max_length=sizes[3]).num_cut_prompts == 1
    _, counts = with_examples(
        rows, examples, tokenizer, template=TEMPLATE, joint="auto", max_length=sizes[3] - 1
    )
    assert counts[0] == 2


def test_room_is_kept_for_the_longest_choice(tokenizer: Any) -> None:
    row = Row(source="x", prompt="a", choices=("b", "c" * 50), answer=0, response="b")
    (shown,) = before([row], EVEN[:1], tokenizer)
    size = max(
        len(e["input_ids"])
        for e in encode_choices(shown, tokenizer, template=TEMPLATE, max_length=999).examples
    )
    how = {"template": TEMPLATE, "joint": "auto"}
    assert with_examples([row], EVEN[:1], tokenizer, max_length=size, **how)[1] == [1]
    assert with_examples([row], EVEN[:1], tokenizer, max_length=size - 1, **how)[1] == [0]


# --- what is refused


@pytest.mark.parametrize(
    ("rows", "examples", "message"),
    [
        (SUMS[:3], SUMS[2:], r"train.jsonl:2: examples must hold no row that is scored, got"),
        ([chat("a", "b")], SUMS[:1], r"examples must be chats, as the rows are, got .*response"),
        (SUMS[:1], [chat("a", "b")], r"examples must be no chats, as the rows are none, got"),
        (
            [chat("a", "b")],
            [chat("c", "d", template_arguments={"tools": [1]})],
            r"chat: examples must come with the tools, .* of the rows, got \{'tools': \[1\]\}",
        ),
    ],
)
def test_examples_that_do_not_go_with_the_rows_are_refused(
    tokenizer: Any, rows: list[Row], examples: list[Row], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        before(rows, examples, tokenizer)


def test_rows_without_examples_have_the_digest_that_they_had() -> None:
    digest = rows_digest(SUMS[:2])
    assert digest == "7f23741d5ba6e9da9004a1b21ba07e14923bcb2457dc4d39276bf863c5a6f82c"
    assert rows_digest([SUMS[0], replace(SUMS[1], before="x")]) != digest
