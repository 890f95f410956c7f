"""What a base has no place for is found in its configuration, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from lowmem_reft.base.limits import Limits
from lowmem_reft.errors import InputError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
YARN = {**LINEAR, "rope_type": "yarn", "original_max_position_embeddings": 32}
FULL = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LINEAR}


class Tokens:
    """As much of a tokenizer as a message needs."""

    model_max_length = 10**30

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"


def limits(kind: str, task_type: str = "CAUSAL_LM", **fields: Any) -> Limits:
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, **fields})
    return Limits.of(config, Tokens(), task_type=task_type)


@pytest.mark.parametrize(
    ("kind", "task_type", "fields", "positions"),
    [
        ("gpt2", "CAUSAL_LM", {"n_positions": 40}, 40),
        ("opt", "CAUSAL_LM", {"max_position_embeddings": 40, "word_embed_proj_dim": 16}, 40),
        ("gptj", "CAUSAL_LM", {"n_positions": 40, "rotary_dim": 4}, 40),
        ("mpt", "CAUSAL_LM", {"max_seq_len": 40}, 40),
        ("bert", "SEQ_CLS", {"max_position_embeddings": 40}, 40),
        ("roberta", "SEQ_CLS", {"max_position_embeddings": 40}, 38),
        ("xlm-roberta", "SEQ_CLS", {"max_position_embeddings": 40}, 38),
        ("mpnet", "SEQ_CLS", {"max_position_embeddings": 40}, 38),
        ("deberta-v2", "SEQ_CLS", {"position_biased_input": False}, None),
        ("llama", "CAUSAL_LM", {"max_position_embeddings": 40}, 40),
        ("llama", "CAUSAL_LM", {"max_position_embeddings": 40, "rope_parameters": LINEAR}, 160),
        ("llama", "CAUSAL_LM", {"max_position_embeddings": 32, "rope_parameters": YARN}, 128),
        (
            "llama",
            "CAUSAL_LM",
            {"max_position_embeddings": 40, "rope_parameters": {**LINEAR, "rope_type": "dynamic"}},
            None,
        ),
        ("gemma3_text", "CAUSAL_LM", {"max_position_embeddings": 40, "rope_parameters": FULL}, 160),
        ("bloom", "CAUSAL_LM", {"n_head": 2}, None),
    ],
)
def test_the_positions_of_a_base_are_those_of_its_tables_or_of_its_rotations(
    kind: str, task_type: str, fields: dict[str, Any], positions: int | None
) -> None:
    found = limits(kind, task_type, **fields)
    assert found.num_positions == positions
    assert found.num_tokens == 64


def test_a_wrapper_of_a_language_model_has_the_limits_of_that() -> None:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES, max_position_embeddings=48)
    )
    found = Limits.of(config, Tokens())
    assert (found.num_tokens, found.num_positions) == (64, 48)


def test_a_token_without_an_embedding_is_named_with_its_row_and_how_many_more_there_are() -> None:
    found = limits("llama", max_position_embeddings=40)
    rows = [[3, 4], [3, 64], [70], [5]]
    said = r"rows:2: tokens must be among the 64 .*, got '<64>' with id 64; so it is in 1 more rows"
    with pytest.raises(InputError, match=said):
        found.check(["rows:1", "rows:2", "rows:3", "rows:4"], rows)


def test_the_last_position_is_used_and_the_next_is_refused() -> None:
    found = limits("llama", max_position_embeddings=8)
    found.check(["rows:1"], [[3] * 8])
    found.check(["rows:1"], [[3] * 5], virtual=2, new=2)  # the last new token is not read
    said = r"rows:2: tokens must fit the 8 positions of the base, got 9 \(.* is token 9, '<4>'\)"
    with pytest.raises(InputError, match=said):
        found.check(["rows:1", "rows:2"], [[3] * 8, [3] * 8 + [4]])
    said = r"got 5 and 2 virtual ones and 3 to generate .*--max-length 4, .* --max-new-tokens"
    with pytest.raises(InputError, match=said):
        found.check(["--prompt"], [[3] * 5], virtual=2, new=3)


def test_more_tokens_than_the_tokenizer_says_are_told(caplog: pytest.LogCaptureFixture) -> None:
    found = limits("llama", max_position_embeddings=64)
    found.tokenizer.model_max_length = 8
    found.check(["rows:1"], [[3] * 8])
    assert not caplog.messages
    found.check(["rows:1"], [[3] * 9])
    (said,) = caplog.messages
    assert "has 9 tokens, more than the 8 that the tokenizer gives" in said
