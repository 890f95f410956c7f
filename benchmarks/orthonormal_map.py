"""The measured orthonormal map: one piece of code for our environment and for a peer's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.common import timed_calls

MIN_SAMPLE_S = 0.2


class Rotation(nn.Module):
    """A (hidden, rank) weight, orthonormal by torch's own parametrization with its defaults.

    pyreft's public source configures its ``LowRankRotateLayer`` this way: orthogonal
    initialisation, then ``torch.nn.utils.parametrizations.orthogonal(layer)``. It stands in where
    pyreft is not installed.
    """

    def __init__(self, hidden: int, rank: int) -> None:
        """Start orthonormal."""
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(hidden, rank)))


def orthonormal_map(
    forward: Callable[[], Tensor], parameter: Tensor, state: Iterable[Tensor]
) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """Facts about the map, and a sample of one forward and one backward pass.

    Args:
        forward: Computes the orthonormal matrix from ``parameter``.
        parameter: The trained tensor.
        state: All tensors that the map keeps between steps.
    """
    matrix = forward()
    upstream = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))

    def action() -> None:
        parameter.grad = None
        torch.autograd.backward(forward(), upstream)

    narrow = matrix.detach().double()
    narrow = narrow if narrow.shape[0] <= narrow.shape[1] else narrow.T
    deviation = (
        (narrow @ narrow.T - torch.eye(narrow.shape[0], dtype=torch.float64)).abs().max().item()
    )
    facts = {
        "orthonormality_error": deviation,
        "state_bytes": sum(t.numel() * t.element_size() for t in state),
        "num_threads": torch.get_num_threads(),
    }
    return facts, timed_calls(action, min_sample_s=MIN_SAMPLE_S)


def parametrized_map(layer: nn.Module) -> tuple[dict[str, Any], Callable[[], dict[str, Any]]]:
    """The map of a layer whose ``weight`` is parametrized by torch."""
    state = [*layer.parameters(), *layer.buffers()]
    (original,) = layer.parameters()
    return orthonormal_map(lambda: cast(Tensor, layer.weight), original, state)
