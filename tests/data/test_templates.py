"""Chat templates of others end, and do not fill the memory."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers import AutoTokenizer

from lowmem_reft.data import templates
from lowmem_reft.data.templates import encode, render
from lowmem_reft.errors import InputError

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


@pytest.fixture
def tokenizer(tiny_llama_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_dir)


def test_a_template_writes_the_conversation_and_leaves_no_limit_behind(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN + "{{ more }}{% if add_generation_prompt %}>{% endif %}"
    before = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    text = render(tokenizer, MESSAGES, source="a:1", add_generation_prompt=True, more="!")
    assert text == "[user]a[assistant]b!>"
    assert (signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{% set ns = namespace(s='aa') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
        "{% endfor %}{{ ns.s }}",
        "{{ 'a' * 10**7 }}",
        "{{ 7 ** (7 ** 9) }}",
        "{% set x = '%99999999999d' % 1 %}{{ x }}",
    ],
)
def test_a_template_that_asks_for_too_much_is_stopped(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.5)
    tokenizer.chat_template = template
    tokenizer.name_or_path = str(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    started = time.process_time()
    with pytest.raises(InputError, match=r"^rows:3: the chat template in .*chat_template\.jinja"):
        render(tokenizer, MESSAGES, source="rows:3")
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "got roles must alternate"),
        ("{{ messages[0].content.x.y }}", "has no attribute 'x'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
        ("{{ " + "(" * 5000 + " }}", "Error"),
    ],
)
def test_a_template_that_fails_is_refused_with_the_row(
    tokenizer: Any, template: str, words: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"^rows:3: messages must suit .*{words}"):
        render(tokenizer, MESSAGES, source="rows:3")


def test_a_tokenizer_whose_patterns_do_not_end_is_refused(tokenizer: Any) -> None:
    assert len(encode(tokenizer, ["a", "b"], source="a")["input_ids"]) == 2
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = split
    with pytest.raises(InputError, match=r"^rows\.jsonl: the tokenizer in .*retry-limit"):
        encode(tokenizer, ["a" * 60 + "c"], source="rows.jsonl")
