from __future__ import annotations

from typing import Any

import pytest

from lowmem_reft.data.rows import Row
from lowmem_reft.data.texts import written
from lowmem_reft.data.tokens import encode_prompts, encode_rows
from lowmem_reft.errors import InputError
from made_tokenizers import byte_level_tokenizer

HEAD = (
    "{% for m in messages %}{% if m.role != 'assistant' %}<|{{ m.role }}|>{{ m.content }}</s>"
    "{% else %}<|assistant|>"
)
TAIL = "</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>"

STRIPS = "{{ m.content.split('</think>')[-1] }}"
PLAIN = "{{ m.content }}"
WRITES = "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{{ m.content }}"
OPENS, CLOSES = "<think>\n", "<think>\n\n</think>\n\n"


def _tokenizer(answer: str, generation_prompt: str) -> Any:
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.chat_template = HEAD + answer + TAIL + generation_prompt + "{% endif %}"
    return tokenizer


def _chat(content: str, **keys: Any) -> Row:
    question = {"role": "user", "content": "Who sat?"}
    answer = {"role": "assistant", "content": content, **keys}
    return Row(source="chats.jsonl:3", messages=(question, answer), response=content)


def _parts(row: Row, tokenizer: Any) -> tuple[str, str]:
    """What is not supervised, and what is, in training."""
    (example,) = encode_rows([row], tokenizer).examples
    size = sum(label == -100 for label in example["labels"])
    ids = example["input_ids"]
    assert ids[:size] == encode_prompts([row], tokenizer).examples[0]["input_ids"]
    return tokenizer.decode(ids[:size]), tokenizer.decode(ids[size:])


PROMPT = "<|user|>Who sat?</s><|assistant|>"
REASONS = "<think>\nA cat did.\n</think>\n\nThe cat."


@pytest.mark.parametrize(
    ("answer", "opened", "row", "response"),
    [
        (STRIPS, OPENS, _chat("The cat."), "\n</think>\n\nThe cat.</s>"),
        (STRIPS, OPENS, _chat(REASONS), "A cat did.\n</think>\n\nThe cat.</s>"),
        (STRIPS, OPENS, _chat(REASONS[8:]), "A cat did.\n</think>\n\nThe cat.</s>"),
        (
            PLAIN,
            OPENS,
            _chat("The cat.", reasoning_content="A cat did."),
            "A cat did.\n</think>\n\nThe cat.</s>",
        ),
        (PLAIN, OPENS, _chat(REASONS), "A cat did.\n</think>\n\nThe cat.</s>"),
        (PLAIN, "<think>", _chat(REASONS), "\nA cat did.\n</think>\n\nThe cat.</s>"),
        (PLAIN, CLOSES, _chat("The cat."), "The cat.</s>"),
        (STRIPS, CLOSES, _chat("The cat."), "The cat.</s>"),
        (WRITES, CLOSES, _chat("The cat."), "The cat.</s>"),
        (WRITES, OPENS, _chat("The cat."), "\n</think>\n\nThe cat.</s>"),
        (
            WRITES,
            OPENS,
            _chat("The cat.", reasoning_content="A cat did."),
            "A cat did.\n</think>\n\nThe cat.</s>",
        ),
        (PLAIN, "<|channel>thought\n<channel|>", _chat("The cat."), "The cat.</s>"),
        (PLAIN, CLOSES, _chat("<b>The</b> <think cat."), "<b>The</b> <think cat.</s>"),
    ],
)
def test_an_answer_follows_the_generation_prompt_of_a_reasoning_model(
    answer: str, opened: str, row: Row, response: str
) -> None:
    prompt, supervised = _parts(row, _tokenizer(answer, opened))
    assert prompt == PROMPT + opened
    assert supervised == response


@pytest.mark.parametrize("answer", [WRITES, PLAIN])
def test_reasoning_that_the_generation_prompt_rules_out_is_refused(answer: str) -> None:
    row = _chat("The cat.", reasoning_content="A cat did.")
    if answer == PLAIN:
        row = _chat(REASONS)
    with pytest.raises(InputError, match=r"chats\.jsonl:3: .*enable_thinking"):
        encode_rows([row], _tokenizer(answer, CLOSES))


@pytest.mark.parametrize("opened", ["<|channel>thought\n", "Sure! ", "<answer>"])
def test_a_generation_prompt_that_no_answer_follows_is_refused(opened: str) -> None:
    with pytest.raises(InputError, match=r"chats\.jsonl:3: the chat template must write a resp"):
        encode_rows([_chat("The cat.")], _tokenizer(PLAIN, opened))


def test_a_chat_template_that_leaves_out_what_is_said_is_refused() -> None:
    tokenizer = byte_level_tokenizer(bos=False)
    tokenizer.chat_template = (  # for content in parts, which text has none of
        "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text }}"
        "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(InputError, match=r"chats\.jsonl:3: .* must write what the user says"):
        encode_prompts([_chat("The cat.")], tokenizer)


def _joined(prompt: str, response: str, joint: Any = "auto", **fields: Any) -> str:
    row = Row(source="rows.jsonl:1", prompt=prompt, response=response, **fields)
    start, (rest,) = written(
        row,
        byte_level_tokenizer(bos=False),
        template="{prompt}",
        joint=joint,
        responses=[response],
    )
    assert start == start.rstrip(" ")
    return start + rest


@pytest.mark.parametrize(
    ("prompt", "response", "joined"),
    [
        ("Answer:", "42", "Answer: 42"),
        ("Who sat?", "The cat.", "Who sat? The cat."),
        ("He said", "\u201cyes\u201d", "He said \u201cyes\u201d"),
        ("Answer: ", "42", "Answer: 42"),
        ("Answer:", "  42", "Answer:  42"),
        ("Answer:\n", "42", "Answer:\n42"),
        ("日本の首都は", "東京です", "日本の首都は東京です"),
        ("答案：", "A", "答案：A"),
        ("เมืองหลวง", "กรุงเทพ", "เมืองหลวงกรุงเทพ"),
        ("한국의 수도는", "서울", "한국의 수도는 서울"),
        ("print(", "1)", "print(1)"),
        ("http://", "example.org", "http://example.org"),
        ("x =", "=1", "x ==1"),
        ("Hello", ", world", "Hello, world"),
        ("hi<|assistant|>", "Hello.", "hi<|assistant|>Hello."),
        ("hi</s>", "Hello.", "hi</s>Hello."),
    ],
)
def test_a_space_is_put_where_words_meet(prompt: str, response: str, joined: str) -> None:
    assert _joined(prompt, response) == joined


def test_a_choice_stands_by_itself_whatever_the_text_ends_with() -> None:
    choices: Any = {"choices": ("good", "bad"), "answer": 0}
    assert _joined("what a f***", "good", **choices) == "what a f*** good"
    assert _joined("好电影", "好", choices=("好", "坏"), answer=0) == "好电影好"


@pytest.mark.parametrize(("joint", "between"), [("space", " "), ("none", "")])
def test_the_joint_is_as_the_user_says(joint: str, between: str) -> None:
    assert _joined("print(", "1)", joint) == f"print({between}1)"
    assert _joined("Answer:", "42", joint) == f"Answer:{between}42"
    assert _joined("Answer:\n", "42", joint) == "Answer:\n42"
