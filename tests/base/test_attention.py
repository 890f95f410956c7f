"""Packed rows attend within each example: what is divided, computed, and left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowmem_reft.base.attention import divided, within_examples
from lowmem_reft.base.synthetic import base_with_random_weights
from tiny_models import SIZES

LENGTHS = [5, 3, 7]


def causal(size: int, window: int | None = None) -> Tensor:
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    return mask if window is None else mask.triu(1 - window)


def packed(*parts: Tensor) -> Tensor:
    return torch.block_diag(*(part.long() for part in parts)).bool()[None, None]


def test_rows_are_divided_where_no_token_attends_across() -> None:
    one = packed(*map(causal, LENGTHS))
    assert divided(one) == [LENGTHS]
    other = packed(causal(15))
    assert divided(torch.cat([one, other])) == [LENGTHS, [15]]
    windows = packed(causal(6, window=2), causal(9, window=3))
    assert divided(windows) == [[6, 9]]


def test_padding_behind_examples_is_one_part() -> None:
    row = packed(causal(5), causal(4), *[causal(1)] * 6)
    assert divided(row) == [[5, 4, 6]]
    assert divided(packed(causal(1), causal(4))) == [[1, 4]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_other_masks_are_left_alone(side: str) -> None:
    assert divided(packed(causal(9))) is None
    attended = torch.ones(9, dtype=torch.bool)
    attended[slice(0, 3) if side == "left" else slice(6, 9)] = False
    assert divided((causal(9) & attended)[None, None]) is None
    # Some token of the second part attends to one of the first.
    leaking = packed(causal(4), causal(5))
    leaking[0, 0, 6, 1] = True
    assert divided(leaking) is None


def small_base(architecture: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES, **fields)
    return base_with_random_weights(
        config, device=torch.device("cpu"), storage="fp32", compute_dtype=torch.float32
    )


def row_of_examples() -> tuple[dict[str, Tensor], list[Tensor]]:
    examples = [torch.randint(3, 60, (size,)) for size in LENGTHS]
    places = torch.cat([torch.arange(size) for size in LENGTHS])
    return {"input_ids": torch.cat(examples)[None], "position_ids": places[None]}, examples


def test_no_more_is_computed_than_each_example_alone() -> None:
    base, (row, examples) = small_base("llama"), row_of_examples()
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    seen = []

    def counted(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return before(module, query, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = counted
    try:
        with within_examples():
            logits = base(**row, use_cache=False).logits[0]
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert seen == LENGTHS * base.config.num_hidden_layers
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    for part, example in zip(logits.split(LENGTHS), examples, strict=True):
        torch.testing.assert_close(part, base(input_ids=example[None]).logits[0])


def test_attention_is_put_back_whatever_happens() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def interrupted() -> None:
        with within_examples():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_windows_and_unpacked_rows_attend_as_ever() -> None:
    base = small_base("mistral", sliding_window=3)
    row, examples = row_of_examples()
    padded = {
        "input_ids": torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
    }
    expected = base(**padded).logits
    with within_examples():
        logits = base(**row, use_cache=False).logits[0]
        assert torch.equal(base(**padded).logits, expected)
    for part, example in zip(logits.split(LENGTHS), examples, strict=True):
        torch.testing.assert_close(part, base(input_ids=example[None]).logits[0])
