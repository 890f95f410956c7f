"""Choices that all rows share, and an answer that is one of them."""

from __future__ import annotations

import pytest

from lowmem_reft.data.chosen import ChoiceReader, are_choices, shared_choices
from lowmem_reft.data.row import Row


def row(*choices: str) -> Row:
    return Row(source="a", prompt="p", choices=choices, answer=0 if choices else None)


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([row("good", "bad")], ["good", "bad"]),
        ([row(" good", "bad\n"), row("bad", "good")], ["good", "bad"]),
        ([row("good", "bad"), row("good", "fair")], None),
        ([row("good", "bad"), row("good", "bad", "fair")], None),
        ([row()], None),
        ([row(*map(str, range(64)))], [*map(str, range(64))]),
        ([row(*map(str, range(65)))], None),
        ([row("a" * 100, "b")], ["a" * 100, "b"]),
        ([row("a" * 101, "b")], None),
        ([row("a", " a")], None),
        ([], None),
    ],
)
def test_choices_are_shared_where_all_rows_have_the_same_few(
    rows: list[Row], shared: list[str] | None
) -> None:
    assert shared_choices(rows) == shared


@pytest.mark.parametrize("wrong", [[], [""], [" "], [" a"], ["a", "a"], ["a" * 101]])
def test_texts_that_no_answer_can_be_are_no_choices(wrong: list[str]) -> None:
    assert not are_choices(wrong)


@pytest.mark.parametrize(
    ("texts", "found", "num_tokens"),
    [
        ([" good"], "good", 1),
        (["", " ", " g", " goo", " good"], "good", 5),
        ([" no", " no idea"], "no idea", 2),
        ([" no", " no id", " no ide?"], "no", 1),
        ([" no", " no\n", " no\n\nno"], "no", 2),
        ([" no", " nothing"], "no", 1),
        ([" caf\ufffd", " café"], "café", 2),
    ],
)
def test_an_answer_is_over_as_soon_as_it_is_a_choice_and_becomes_no_other(
    texts: list[str], found: str, num_tokens: int
) -> None:
    reader = ChoiceReader(["good", "no", "no idea", "café"])
    *before, last = enumerate(texts, start=1)
    assert not any(reader.read(text, number) for number, text in before)
    number, text = last
    assert reader.read(text, number)
    assert (reader.found, reader.num_tokens) == (f" {found}", num_tokens)


@pytest.mark.parametrize("texts", [[" goods"], [" nothing"], [" G", " Good"], [" a", " a good"]])
def test_an_answer_that_is_no_choice_does_not_end(texts: list[str]) -> None:
    reader = ChoiceReader(["good", "no", "no idea"])
    assert not any(reader.read(text, number) for number, text in enumerate(texts, start=1))
    assert not reader.may_become


def test_without_choices_nothing_ends() -> None:
    reader = ChoiceReader([])
    assert not reader.may_become
    assert not reader.read("", 1)
