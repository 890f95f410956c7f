"""Attention to a constant prefix against torch's own; what else attends is left alone."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowmem_reft.reuse import attention
from lowmem_reft.reuse.attention import attend, attending_to_prefix

PREFIX = 7


def tensors(
    heads: int, groups: int, new: int, width: int = 8, *, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Two examples, the first with a shorter prefix and a shorter answer."""
    torch.manual_seed(0)
    mask = torch.ones(new, PREFIX + new, dtype=torch.bool).tril(PREFIX).repeat(2, 1, 1, 1)
    mask[0, :, :, :3] = mask[0, :, :, -1] = False
    own, constant = (2, groups, new, width), (2, groups, PREFIX, width)
    return {
        "query": torch.randn(2, new, heads, width, dtype=dtype).requires_grad_(),
        "own_key": torch.randn(own, dtype=dtype).requires_grad_(),
        "own_value": torch.randn(own, dtype=dtype).requires_grad_(),
        "key": torch.randn(constant, dtype=dtype),
        "value": torch.randn(constant, dtype=dtype),
        "mask": mask,
    }


def joined(of: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.cat([of["key"], of["own_key"]], 2)
    values = torch.cat([of["value"], of["own_value"]], 2)
    return of["query"].transpose(1, 2), keys, values


def gradients(of: dict[str, Tensor], out: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    trained = (of["query"], of["own_key"], of["own_value"])
    return [out, *torch.autograd.grad(out, trained, torch.randn_like(out))]


def by_torch(of: dict[str, Tensor], mask: Tensor, scale: float | None) -> list[Tensor]:
    query, keys, values = joined(of)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return gradients(of, out.transpose(1, 2))


# A few numbers of scores at once: one token of one group, several groups, all of an example.
@pytest.mark.parametrize("score_bytes", [1, 8 * 2 * 13 * 6, 2**22])
@pytest.mark.parametrize(("heads", "groups", "new"), [(6, 3, 6), (6, 2, 1), (4, 4, 6), (6, 1, 40)])
def test_outputs_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, score_bytes: int, heads: int, groups: int, new: int
) -> None:
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    of = tensors(heads, groups, new)
    additive = torch.randn(2, 1, new, PREFIX + new, dtype=torch.float64)
    for mask, scale in product((of["mask"], of["mask"][1:], additive), (None, 0.3)):
        found = gradients(of, attend(*joined(of), mask, PREFIX, scale=scale))
        for ours, torchs in zip(found, by_torch(of, mask, scale), strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-10, atol=1e-12)


def test_a_token_that_attends_to_nothing_has_finite_gradients() -> None:
    of = tensors(4, 2, 3)
    of["mask"][0, :, 1] = False
    found = gradients(of, attend(*joined(of), of["mask"], PREFIX))
    assert all(bool(tensor.isfinite().all()) for tensor in found)


def test_no_more_is_kept_than_copies_of_keys_and_values_for_each_head_take() -> None:
    def kept(new: int) -> int:
        sizes: list[int] = []
        of = tensors(6, 2, new, dtype=torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor.detach(), lambda tensor: tensor
        ):
            attend(*joined(of), of["mask"].float(), PREFIX)
        return sum(sizes)

    for new in range(1, 24):
        length = PREFIX + new
        copies = 2 * 2 * 6 * length * 8
        assert kept(new) <= 2 * new * 6 * 8 + copies + 2 * new * length


def named(of: dict[str, Tensor], **changes: Any) -> dict[str, Any]:
    query, keys, values = joined(of)
    call = {"query": query, "key": keys, "value": values, "attention_mask": of["mask"]}
    return {**call, "dropout": 0.0, "scaling": None, **changes}


def test_what_is_no_attention_to_the_prefix_is_left_to_the_one_that_was_there() -> None:
    of = tensors(4, 4, 3)
    calls: list[Any] = []

    def plain(*args: Any, **kwargs: Any) -> tuple[str, None]:
        calls.append(args)
        return "plain", None

    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = plain
    try:
        with attending_to_prefix(PREFIX, "cpu"):
            function = ALL_ATTENTION_FUNCTIONS["sdpa"]
            assert isinstance(function(None, **named(of))[0], Tensor)
            others: list[dict[str, Any]] = [
                {"dropout": 0.1},
                {"softcap": 30.0},
                {"position_bias": torch.zeros(1)},
                {"attention_mask": None},
                {"attention_mask": of["mask"][:, :, :, :3]},
                {"key": of["own_key"]},
                {"query": joined(of)[0].detach()},
                {"query": joined(of)[0].bfloat16()},
            ]
            for change in others:
                assert function(None, **named(of, **change))[0] == "plain"
        assert len(calls) == len(others)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
        for prefix, device_type in ((0, "cpu"), (PREFIX, "cuda")):
            with attending_to_prefix(prefix, device_type):
                assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
