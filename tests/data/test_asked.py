"""Rows that are no chats, asked through the tokenizer's chat template."""

from __future__ import annotations

from typing import Any

import pytest

from lowmem_reft.data.ends import end_ids
from lowmem_reft.data.few_shot import with_examples
from lowmem_reft.data.rows import Row
from lowmem_reft.data.tokens import encode_all_choices, encode_prompts, encode_rows
from lowmem_reft.errors import InputError
from made_tokenizers import byte_level_tokenizer

TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
TEMPLATES = {
    "plain": (TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}", ""),
    "default system message": (
        "{% if messages[0].role != 'system' %}<s>You help: who sat?<|end|>\n{% endif %}"
        + TURNS
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<s>You help: who sat?<|end|>\n",
    ),
    "no system message": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}<s>"
        + TURNS
        + "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "<s>",
    ),
    "no generation prompt": (TURNS, ""),
}
ROW = Row(source="rows.jsonl:1", prompt="Who sat?", response="The cat.")


def tokenizer_of(name: str, *, bos: bool = True) -> Any:
    tokenizer = byte_level_tokenizer(bos=bos)
    tokenizer.chat_template = TEMPLATES[name][0]
    return tokenizer


def parts(example: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    size = example["labels"].count(-100)
    ids = example["input_ids"]
    return tokenizer.decode(ids[:size]), tokenizer.decode(ids[size:])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_the_users_message_and_the_end_of_the_answer_is_trained(name: str) -> None:
    tokenizer, start = tokenizer_of(name), TEMPLATES[name][1]
    (example,) = encode_rows([ROW], tokenizer, template="chat").examples
    prompt, response = parts(example, tokenizer)
    assert prompt == f"{start}<|user|>Who sat?<|end|>\n<|assistant|>"
    assert response == "The cat.<|end|></s>"
    assert example["input_ids"].count(tokenizer.bos_token_id) == start.count("<s>")
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "</s>")]
    assert end_ids(tokenizer, chats=True) == sorted(ends)


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_has_the_tokens_of_a_chat_of_one_turn(name: str) -> None:
    tokenizer = tokenizer_of(name)
    messages: Any = (
        {"role": "user", "content": "Who sat?"},
        {"role": "assistant", "content": "The cat."},
    )
    chat = Row(source="chats.jsonl:1", messages=messages, response="The cat.")
    for template in ("chat", "{prompt}"):
        assert encode_rows([chat], tokenizer, template=template) == encode_rows(
            [ROW], tokenizer, template="chat"
        )


@pytest.mark.parametrize("name", TEMPLATES)
def test_choices_are_answers_that_end(name: str) -> None:
    tokenizer, start = tokenizer_of(name), TEMPLATES[name][1]
    row = Row(source="r", prompt="Who sat?", choices=("a", "b c"), answer=1, response="b c")
    (encoded,) = encode_all_choices([row], tokenizer, template="chat")
    asked = f"{start}<|user|>Who sat?<|end|>\n<|assistant|>"
    assert [parts(example, tokenizer) for example in encoded.examples] == [
        (asked, "a<|end|>"),
        (asked, "b c<|end|>"),
    ]
    assert encode_rows([row], tokenizer, template="chat").examples == [encoded.examples[1]]
    (prompt,) = encode_prompts([row], tokenizer, template="chat").examples
    assert tokenizer.decode(prompt["input_ids"]) == asked


def test_what_does_not_fit_is_cut_from_the_prompt_alone() -> None:
    tokenizer = tokenizer_of("default system message")
    long = Row(source="r", prompt="who sat? " * 40, response="b")
    size = len(encode_rows([ROW], tokenizer, template="chat").examples[0]["input_ids"]) + 10
    encoded = encode_rows([long], tokenizer, template="chat", max_length=size)
    prompt, response = parts(encoded.examples[0], tokenizer)
    assert prompt.startswith("<s>You help: who sat?<|end|>\n<|user|>")
    assert prompt.endswith("sat? <|end|>\n<|assistant|>")
    assert (response, encoded.num_cut_prompts) == ("b<|end|></s>", 1)


def test_solved_examples_are_earlier_turns() -> None:
    tokenizer = tokenizer_of("default system message")
    example = Row(source="e", prompt="Who ran?", response="A dog.")
    how: Any = {"template": "chat", "joint": "auto"}
    rows, counts = with_examples([ROW], [example], tokenizer, max_length=512, **how)
    assert counts == [1]
    (encoded,) = encode_rows(rows, tokenizer, **how).examples
    assert parts(encoded, tokenizer)[0] == (
        "<s>You help: who sat?<|end|>\n<|user|>Who ran?<|end|>\n<|assistant|>A dog.<|end|>\n"
        "<|user|>Who sat?<|end|>\n<|assistant|>"
    )


def test_without_a_chat_template_it_is_refused() -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .* has a chat template, got none.*--raw"):
        encode_rows([ROW], byte_level_tokenizer(bos=True), template="chat")
