"""Where the constant part of an adapted model ends, and how its output is fed instead of run."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowmem_reft.blocks import base_of, find_blocks
from lowmem_reft.tuner import SUBMODULE, ReftLayer

if TYPE_CHECKING:
    from collections.abc import Iterator


def num_constant_blocks(model: Any) -> int:
    """Return how many blocks, from the first, have outputs that training does not change.

    A block whose output is edited is itself constant: the edit comes after it. 0 means that nothing
    can be reused, for example because the embedding is trained.

    Args:
        model: A PeftModel with any method: ReFT, LoRA on some layers, ...
    """
    base = base_of(model)
    name, blocks = find_blocks(base)
    inside = {id(parameter) for parameter in blocks.parameters()}
    above = {id(parameter) for parameter in _parameters_above(base, name)}
    for parameter in base.parameters():
        if parameter.requires_grad and id(parameter) not in inside | above:
            return 0  # an embedding, which comes first of all
    for index, block in enumerate(blocks):
        layer = getattr(block, SUBMODULE, None)
        edit = list(layer.parameters()) if isinstance(layer, ReftLayer) else []
        of_edit = {id(parameter) for parameter in edit}
        if any(p.requires_grad and id(p) not in of_edit for p in block.parameters()):
            return index
        if any(parameter.requires_grad for parameter in edit):
            return index + 1
    return len(blocks)


def _parameters_above(base: nn.Module, name_of_blocks: str) -> list[nn.Parameter]:
    """Return the parameters of what runs after the blocks: classification and language heads."""
    backbone = name_of_blocks.partition(".")[0]
    return [
        parameter
        for name, child in base.named_children()
        if name != backbone
        for parameter in child.parameters()
    ]


class Feed:
    """Stands in for the first blocks of a model while it is switched on.

    The model's own forward goes on around it: masks, rotary tables and the upper blocks are its
    own. Whatever it does to its embeddings has no effect, because the last block that is fed
    returns the stored hidden vectors.
    """

    def __init__(self, model: Any, num_blocks: int) -> None:
        self.blocks = list(find_blocks(base_of(model))[1])[:num_blocks]
        self.hidden: Tensor | None = None
        """What the last block returns, (batch, seq, hidden)."""
        self.seen: Tensor | None = None
        """While recording: what the last block returned."""

    @contextmanager
    def feeding(self, hidden: Tensor) -> Iterator[None]:
        """Let the model skip its first blocks and go on from ``hidden``."""
        last = self.blocks[-1]
        for block in self.blocks:
            value = hidden if block is last else None
            block.__dict__["forward"] = _Skip(value)
        try:
            yield
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Stop every forward pass after the last of the blocks and keep what it returned."""

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            raise TrunkReached(output[0] if isinstance(output, tuple) else output)

        # Before the edit, which is the first of the hooks otherwise.
        handle = self.blocks[-1].register_forward_hook(stop, prepend=True)
        try:
            yield
        finally:
            handle.remove()


class TrunkReached(BaseException):
    """Carries the hidden vectors out of a forward pass that has come to the end of the trunk."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Skip:
    """A block's forward that returns a stored value, or its input."""

    def __init__(self, value: Tensor | None) -> None:
        self.value = value

    def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        return hidden if self.value is None else self.value
