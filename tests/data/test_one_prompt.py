"""The same row has the same prompt tokens wherever it is read, with every kind of tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lowmem_reft.data.rows import Row
from lowmem_reft.data.tokens import encode_choices, encode_prompts, encode_rows, encode_texts
from lowmem_reft.data.turns import of_turns
from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.methods.several import NamedAdapter
from lowmem_reft.options import ChatOptions, ModelOptions
from lowmem_reft.runs.chat import Chat
from made_tokenizers import TOKENIZERS, unigram_tokenizer

CHAT_TEMPLATES = {
    "ChatML": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thinks": "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "thinks not": "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] <think>\n\n</think>\n\n{% endif %}",
    "no generation prompt": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>"
    "{% endfor %}",
    "BOS, default system message": "<s>{% if messages[0].role != 'system' %}<|system|>Help.</s>"
    "{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "space at the end": "{% for m in messages %}{{ m.role }}: {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}

LOSSLESS = {
    **{name: make for name, make in TOKENIZERS.items() if name.startswith(("byte", "slow"))},
    "unigram, bytes": lambda: unigram_tokenizer(),
}
for directory in os.environ.get("LOWMEM_REFT_MODELS", "").split(os.pathsep):
    if directory:
        LOSSLESS[os.path.basename(directory)] = lambda path=directory: (
            AutoTokenizer.from_pretrained(path)
        )

# Latin-1, so that the slow tokenizer of the tests knows all of it; white space and marks are likely
# to merge.
PIECES = st.sampled_from(
    [
        " ",
        "  ",
        "\n",
        "\n\n",
        "    ",
        "\t",
        ":",
        "(",
        ")",
        "/",
        "ab",
        "c",
        "Answer",
        "the",
        "</",
        "é",
    ]
)
TEXTS = st.lists(
    PIECES | st.text(st.characters(codec="latin-1", exclude_categories=["Cc"])),
    min_size=1,
    max_size=8,
).map("".join)
SAID = TEXTS.filter(lambda text: bool(text.strip()))
FEW = settings(
    max_examples=int(os.environ.get("LOWMEM_REFT_EXAMPLES", "25")),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)


@pytest.fixture(scope="module", params=LOSSLESS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return LOSSLESS[request.param]()


def _prompt_of(example: dict[str, list[int]]) -> list[int]:
    size = sum(label == -100 for label in example["labels"])
    assert all(label == -100 for label in example["labels"][:size])
    return example["input_ids"][:size]


@contextmanager
def _accepted() -> Iterator[None]:
    """Leave out what a tokenizer cannot write: it knows no character, or joins words across."""
    try:
        yield
    except InputError as refused:
        reasons = (
            "must have a token of its own",
            "must have tokens",
            "must not merge",
            "may begin another",
        )
        assume(not any(reason in str(refused) for reason in reasons))
        raise


def _text(ids: list[int], tokenizer: Any) -> str:
    """What tokens say, without the special ones that frame them."""
    frame = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    ids = ids[ids[:1] == frame[0] :]
    return tokenizer.decode(ids[: len(ids) - (ids[-1:] == frame[1])])


@FEW
@given(
    prompt=SAID,
    responses=st.lists(SAID, min_size=2, max_size=3, unique_by=str.strip),
    joint=st.sampled_from(["auto", "space", "none"]),
)
@example(prompt="def f(a):\n", responses=["    return a", "pass"], joint="auto")
@example(prompt="print(", responses=[")", "1)"], joint="none")
@example(prompt="Who?", responses=["1", "10"], joint="auto")
def test_a_prompt_has_the_same_tokens_wherever_it_is_read(
    tokenizer: Any, prompt: str, responses: list[str], joint: Any
) -> None:
    row = Row(source="row 1", prompt=prompt, response=responses[0])
    choices = Row(
        source="row 1", prompt=prompt, choices=tuple(responses), answer=0, response=responses[0]
    )
    with _accepted():
        asked = encode_prompts([row], tokenizer).examples[0]["input_ids"]
        (trained,) = encode_rows([row], tokenizer, joint=joint).examples
        (chosen,) = encode_rows([choices], tokenizer, joint=joint).examples
        scored = encode_choices(choices, tokenizer, joint=joint).examples
    assert _prompt_of(trained) == asked
    assert [_prompt_of(example) for example in scored] == [asked] * len(responses)
    assert chosen == scored[0]
    text = _text(trained["input_ids"], tokenizer)
    wanted = [prompt + responses[0], *([f"{prompt} {responses[0]}"] * (joint != "none"))]
    encoded = tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert text in [tokenizer.decode(ids) for ids in encoded]
    ends = [example["input_ids"][len(asked) :] for example in scored]
    assert not any(a is not b and b[: len(a)] == a for a in ends for b in ends)


@FEW
@given(prompt=TEXTS, response=TEXTS)
def test_texts_of_others_are_tokenized_as_rows_are(
    tokenizer: Any, prompt: str, response: str
) -> None:
    assume(prompt.strip() and response.strip())
    row = Row(source="row 1", prompt=prompt, response=response)
    with _accepted():
        ((ids, rest),) = encode_texts([(prompt, response)], tokenizer)
        (trained,) = encode_rows([row], tokenizer, joint="none").examples
    assert ids == encode_prompts([row], tokenizer).examples[0]["input_ids"]
    assert ids + rest == trained["input_ids"][: len(ids) + len(rest)]
    ((alone, nothing),) = encode_texts([(prompt, "")], tokenizer)
    assert (alone, nothing) == (ids, [])


@FEW
@given(contents=st.lists(SAID, min_size=2, max_size=6), name=st.sampled_from([*CHAT_TEMPLATES]))
def test_every_turn_of_a_chat_is_trained_after_what_is_asked_at_inference(
    tokenizer: Any, contents: list[str], name: str
) -> None:
    contents = contents[: len(contents) // 2 * 2]
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    messages = tuple(
        {"role": role, "content": content}
        for role, content in zip(["user", "assistant"] * 3, contents, strict=False)
    )
    row = Row(source="chat 1", messages=messages, response=contents[-1])
    turns = of_turns([row], "all")
    assert [len(turn.messages) for turn in turns] == list(range(2, len(contents) + 1, 2))
    chat = _chat(tokenizer)
    for turn in turns:
        (trained,) = encode_rows([turn], tokenizer, max_length=4096).examples
        prompt = _prompt_of(trained)
        asked = Row(source="chat 1", messages=turn.messages[:-1])
        assert (
            prompt == encode_prompts([asked], tokenizer, max_length=4096).examples[0]["input_ids"]
        )
        assert prompt == chat._prompt(turn.messages[:-1], "tuned")
        said = tokenizer(turn.messages[-1]["content"], add_special_tokens=False)["input_ids"]
        known = tokenizer.decode(said).strip()  # some tokenizers drop characters
        assert known in tokenizer.decode(trained["input_ids"][len(prompt) :])


@FEW
@given(
    prompt=SAID,
    responses=st.lists(SAID, min_size=2, max_size=3, unique_by=str.strip),
    name=st.sampled_from([*CHAT_TEMPLATES]),
)
def test_a_prompt_asked_through_the_chat_template_has_the_same_tokens_wherever_it_is_read(
    tokenizer: Any, prompt: str, responses: list[str], name: str
) -> None:
    tokenizer.chat_template = CHAT_TEMPLATES[name]
    row = Row(source="row 1", prompt=prompt, response=responses[0])
    choices = Row(
        source="row 1", prompt=prompt, choices=tuple(responses), answer=0, response=responses[0]
    )
    user = {"role": "user", "content": prompt}
    messages: Any = (user, {"role": "assistant", "content": responses[0]})
    with _accepted():
        asked = encode_prompts([row], tokenizer, template="chat").examples[0]["input_ids"]
        (trained,) = encode_rows([row], tokenizer, template="chat").examples
        (chosen,) = encode_rows([choices], tokenizer, template="chat").examples
        scored = encode_choices(choices, tokenizer, template="chat").examples
        chat = Row(source="row 1", messages=messages, response=responses[0])
        assert encode_rows([chat], tokenizer).examples == [trained]
    assert _prompt_of(trained) == asked
    assert [_prompt_of(example) for example in scored] == [asked] * len(responses)
    assert chosen == scored[0]
    assert _chat(tokenizer, "chat")._prompt([user], "tuned") == asked
    if tokenizer.bos_token not in (None, tokenizer.eos_token):
        assert asked.count(tokenizer.bos_token_id) == CHAT_TEMPLATES[name].startswith("<s>")


def _chat(tokenizer: Any, template: str = "{prompt}") -> Chat:
    card = TrainingCard(base="", storage=None, template=template)
    adapter = NamedAdapter(name="tuned", peft_name="default", directory=None, card=card)
    config = LlamaConfig(
        vocab_size=100_000, hidden_size=2, intermediate_size=2, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=10_000,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    return Chat(model, tokenizer, [adapter], ChatOptions(model=ModelOptions(model="base")))
