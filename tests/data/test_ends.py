"""An answer ends where training ends it: at EOS, and where the chat template ends a turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer

from lowmem_reft.data.ends import end_ids

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> Any:
    found = AutoTokenizer.from_pretrained(tiny_llama_dir)
    marks = [AddedToken(text, special=False) for text in ("<|im_start|>", "<|im_end|>", "<|im")]
    found.add_tokens(marks)
    return found


def test_without_chats_an_answer_ends_at_eos_alone(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    assert end_ids(tokenizer) == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    assert end_ids(tokenizer) == []


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|im_end|>"]),
        (CHATML.replace("m.content", "m.content | trim + ' '"), ["<|im_end|>"]),
        (CHATML.replace("<|im_end|>", "</s>"), []),
        (CHATML.replace("<|im_end|>", ""), []),
        (CHATML.replace("<|im_end|>", " ### End"), []),
        (CHATML.replace("<|im_end|>", "<|im_end|></s>"), ["<|im_end|>"]),
        (None, []),
        ("{{ raise_exception('system first') }}", []),
        ("{{ messages[0].content.no.such }}", []),
        ("no answer is written", []),
    ],
)
def test_a_chat_also_ends_where_its_template_ends_a_turn(
    tokenizer: Any, template: str | None, ends: list[str]
) -> None:
    tokenizer.chat_template = template
    wanted = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(ends)}
    assert end_ids(tokenizer, chats=True) == sorted(wanted)
