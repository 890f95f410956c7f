"""Runs a part of a model's blocks inside the model's own forward pass.

Masks, rotary tables and whatever else a forward prepares stay the model's own. Whatever it does to
its embeddings has no effect on fed hidden vectors, because the last block that is skipped returns
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

from torch import Tensor, nn
from transformers import DynamicCache

from lowmem_reft.base.blocks import base_of, find_blocks, standing_in
from lowmem_reft.base.caches import with_cache


class Reached(BaseException):
    """Carries the hidden vectors out of a forward pass that has come as far as it should."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@contextmanager
def feeding(model: Any, num_blocks: int, hidden: Tensor) -> Iterator[None]:
    """Let a model skip its first blocks (0: none) and go on from ``hidden``, (batch, seq, hidden).

    That is what the last of them returns, before any edit.
    """
    blocks = blocks_of(model)[:num_blocks]
    with ExitStack() as stack:
        for block in blocks:
            value = hidden if block is blocks[-1] else None
            stack.enter_context(standing_in(block, partial(_skip, value)))
            if getattr(block, "gradient_checkpointing", False):
                # transformers before 5.23 would run it again once nothing stands in for it.
                stack.enter_context(mock.patch.object(block, "gradient_checkpointing", False))
        yield


def _skip(value: Tensor | None, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """Be the forward of a block: return a stored value, or the input."""
    return hidden if value is None else value


def run_up_to(model: Any, num_blocks: int, inputs: dict[str, Any]) -> Tensor:
    """Return what leaves the first blocks before any edit of the last, (batch, seq, hidden).

    Adapters stay as they are; ``inputs`` are arguments of the base's forward.
    """

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        raise Reached(output[0] if isinstance(output, tuple) else output)

    # First among the hooks: the edit is one of them.
    handle = blocks_of(model)[num_blocks - 1].register_forward_hook(stop, prepend=True)
    try:
        base_of(model)(**inputs)
    except Reached as reached:
        return reached.hidden
    finally:
        handle.remove()
    raise RuntimeError(f"the forward pass never came to block {num_blocks - 1}")


def keys_and_values(
    model: Any, num_blocks: int, inputs: dict[str, Any]
) -> Sequence[tuple[Tensor, Tensor]]:
    """Return keys and values, (batch, heads, seq, head_dim) each, of the blocks after the first.

    The pass ends where the last block has them: its attention and MLP do not run. Adapters stay as
    they are; ``inputs`` are arguments of the base's forward.
    """
    base = base_of(model)
    cache = _Cache(config=base.config)
    cache.last = len(blocks_of(model)) - 1
    try:
        base(**inputs, **with_cache(base, cache))
    except Reached:
        upper: Any = cache.layers[num_blocks:]
        return [(layer.keys, layer.values) for layer in upper]
    raise RuntimeError("the forward pass never came to the last block")


def blocks_of(model: Any) -> Sequence[nn.Module]:
    """Return the blocks of a model or a PeftModel."""
    return list(find_blocks(base_of(model))[1])


class _Cache(DynamicCache):
    """Ends the forward pass once the last layer's keys and values are there."""

    last: int

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.last:
            raise Reached(key_states)
        return result
