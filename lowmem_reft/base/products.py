"""A product of a few vectors with a large matrix, in the order that a CPU is fastest in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PART_ROWS = 2000
"""Rows of the matrix that are multiplied at once."""


def linear_in_parts(
    vectors: Float[Tensor, "n inner"], weight: Float[Tensor, "rows inner"]
) -> Float[Tensor, "n rows"]:
    """Return xWᵀ; in fp32 on a CPU a part of the rows at a time.

    Before it multiplies, MKL copies a transposed matrix in the order it wants it. Where vectors are
    few that is a good part of the work, and a quarter less of it while the copy fits the cache.
    """
    if vectors.device.type != "cpu" or vectors.dtype != torch.float32:
        return vectors @ weight.T
    products = vectors.new_empty(len(vectors), len(weight))
    for start in range(0, len(weight), PART_ROWS):
        part = slice(start, start + PART_ROWS)
        torch.mm(vectors, weight[part].T, out=products[:, part])
    return products
