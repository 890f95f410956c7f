"""Attention to a constant prefix on a CPU: what torch's own kernel would compute for nobody.

torch's kernel wants as many heads of keys as of queries, so models with grouped heads copy the
prefix once for each query head, and its backward pass forms the gradients of all of those copies.
The prefix is constant: here only the gradients of queries and of the new tokens' own keys and
values are formed, on grouped heads, a few MiB of scores at a time. They are computed again in the
backward pass, unless they are fewer than the numbers of those copies: then they are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowmem_reft.base.attention import in_place_of_torchs

SCORE_BYTES = 2**22
"""Scores that exist at once (a backward pass has four matrices of their size)."""


def attending_to_prefix(num_tokens: int, device_type: str) -> AbstractContextManager[None]:
    """Let models attend to so many constant tokens in this way for a while, on a CPU, in fp32.

    Attention of any other kind, or by any other implementation, is left as it is.
    """
    if device_type != "cpu" or not num_tokens:
        return nullcontext()
    return in_place_of_torchs(lambda plain: partial(_attend, plain, num_tokens))


def _attend(
    plain: Callable[..., Any],
    num_constant: int,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Be an attention function of transformers; ``plain`` is the one that would have run."""
    scale = kwargs.get("scaling")
    length = key.shape[2]
    is_known = (
        not (args or kwargs.get("dropout"))
        and kwargs.get("softcap") is kwargs.get("position_bias") is None
        and query.requires_grad
        and query.dtype in (torch.float32, torch.float64)
        and length == num_constant + query.shape[2]
        and attention_mask is not None
        and tuple(attention_mask.shape[1:]) == (1, query.shape[2], length)
        and not attention_mask.requires_grad
    )
    if not is_known:
        return plain(module, query, key, value, attention_mask, *args, **kwargs)
    assert attention_mask is not None
    return attend(query, key, value, attention_mask, num_constant, scale=scale), None


def attend(
    query: Float[Tensor, "batch heads new width"],
    key: Float[Tensor, "batch groups all width"],
    value: Float[Tensor, "batch groups all value_width"],
    mask: Tensor,
    num_constant: int,
    *,
    scale: float | None = None,
) -> Float[Tensor, "batch new heads value_width"]:
    """Return softmax(scale · QKᵀ + mask) V; the first keys and values get no gradient.

    Args:
        query: Of new tokens.
        key: Of the constant tokens and the new ones; heads share it in groups.
        value: The same.
        mask: (batch or 1, 1, new, all): True where a token attends, or what is added to scores.
        num_constant: How many keys and values need no gradient.
        scale: Of scores; default: 1 / sqrt(width).
    """
    if mask.dtype == torch.bool:
        # Not -inf: a row of nothing else would not be a number.
        least = torch.finfo(query.dtype).min / 2
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), least)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Attention.apply(query, key, value, mask, num_constant, factor)  # type: ignore[no-untyped-call]
    return out


class _Part(NamedTuple):
    """Scores that exist at once: of some groups of heads, and new tokens, of one example."""

    example: int
    groups: slice
    tokens: slice


def _parts(query: Tensor, key: Tensor) -> Iterator[_Part]:
    """Divide attention evenly into parts of at most ``SCORE_BYTES``."""
    batch, heads, new, _ = query.shape
    groups = key.shape[1]
    token_bytes = query.element_size() * heads // groups * key.shape[2]
    tokens = max(1, min(new, SCORE_BYTES // token_bytes))
    most = max(1, SCORE_BYTES // (token_bytes * tokens))
    size = -(-groups // -(-groups // most))
    for example in range(batch):
        for group in range(0, groups, size):
            for token in range(0, new, tokens):
                yield _Part(example, slice(group, group + size), slice(token, token + tokens))


def _rows(by_group: Tensor, part: _Part) -> Tensor:
    """Return (groups, heads of each * tokens, width) of (batch, groups, heads, tokens, width)."""
    return by_group[part.example, part.groups, :, part.tokens].flatten(1, 2)


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """View (batch, heads, tokens, width) as (batch, groups, heads of each, tokens, width)."""
    by_group: Tensor = tensor.unflatten(1, (groups, tensor.shape[1] // groups))
    return by_group


def _weights(rows: Tensor, keys: Tensor, mask: Tensor, part: _Part) -> Tensor:
    """Return softmax(QKᵀ + mask), (groups, rows, all); ``rows`` are scaled queries."""
    scores = torch.bmm(rows, keys.transpose(1, 2))
    allowed = mask[part.example % mask.shape[0], 0, part.tokens]  # (tokens, all)
    scores.unflatten(1, (-1, allowed.shape[0])).add_(allowed)
    return scores.softmax(-1)


class _Attention(torch.autograd.Function):
    r"""With P the weights and G the gradient of the output: ∂V = PᵀG, ∂P = GVᵀ.

    ∂S = P ⊙ (∂P − rowsum(P ⊙ ∂P)), ∂Q = scale · ∂S K, ∂K = scale · ∂SᵀQ; of ∂V and ∂K only the rows
    of new tokens.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        num_constant: int,
        scale: float,
    ) -> Tensor:
        batch, heads, new, width = query.shape
        groups = key.shape[1]
        kept: list[Tensor] = []
        keeps = heads * new <= (heads - groups) * (width + value.shape[-1])
        out = value.new_empty(batch, new, heads, value.shape[-1])
        queries, outs = _by_group(query, groups), _by_group(out.transpose(1, 2), groups)
        for part in _parts(query, key):
            weights = _weights(
                _rows(queries, part) * scale, key[part.example, part.groups], mask, part
            )
            product = torch.bmm(weights, value[part.example, part.groups])
            place = outs[part.example, part.groups, :, part.tokens]
            place.copy_(product.view(place.shape))
            if keeps:
                kept.append(weights)
        ctx.save_for_backward(query, key, value, mask, *kept)
        ctx.num_constant, ctx.scale = num_constant, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        query, key, value, mask, *kept = ctx.saved_tensors
        own, groups = slice(ctx.num_constant, None), key.shape[1]
        query_gradient = torch.empty_like(query)
        key_gradient, value_gradient = torch.zeros_like(key), torch.zeros_like(value)
        queries, gradients = _by_group(query, groups), _by_group(query_gradient, groups)
        outs = _by_group(grads[0].transpose(1, 2), groups)
        for number, part in enumerate(_parts(query, key)):
            here = (part.example, part.groups)
            rows, out = _rows(queries, part) * ctx.scale, _rows(outs, part)
            weights = kept[number] if kept else _weights(rows, key[here], mask, part)
            value_gradient[here][:, own].baddbmm_(weights[:, :, own].transpose(1, 2), out)
            scores = torch.bmm(out, value[here].transpose(1, 2))
            scores = torch._softmax_backward_data(scores, weights, -1, weights.dtype)
            key_gradient[here][:, own].baddbmm_(scores[:, :, own].transpose(1, 2), rows)
            place = gradients[part.example, part.groups, :, part.tokens]
            torch.mul(torch.bmm(scores, key[here]).view(place.shape), ctx.scale, out=place)
        return query_gradient, key_gradient, value_gradient, None, None, None
