"""What this package hangs on a module of another library: one object, under one name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from lowmem_reft.base.residency import Residency

_NAME = "_lowmem_reft"


@dataclass(slots=True, kw_only=True)
class Ours:
    """What is known of a base or of one of its MLPs."""

    residency: Residency | None = None
    """Which blocks are on the device, where not all of them are; ``base.residency`` for users."""
    has_new_head: bool = False
    """The checkpoint had no values for the head."""
    forward_with_logits: Callable[..., Any] | None = None
    """The base's own forward, where ``loss`` has put another in its place."""
    knows_head: bool = False
    """That other one forms supervised logits alone, by itself."""
    forward_of_all_tokens: Callable[..., Any] | None = None
    """An MLP's own forward, where ``techniques`` has put another in its place."""
    blocks: tuple[str, nn.ModuleList] | None = None
    """Name and list of a model's blocks, as ``blocks.find_blocks`` has found them."""


def ours(module: nn.Module) -> Ours:
    """Return what hangs on a module; nothing is known of one that has nothing."""
    held: Ours = module.__dict__.setdefault(_NAME, Ours())
    return held
