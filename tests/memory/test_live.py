"""Live storages against sums done by hand."""

from __future__ import annotations

import torch

from lowmem_reft.memory import peak_rss_bytes, track

KIB = 1024


def test_the_peak_is_the_largest_sum_of_live_storages() -> None:
    with track() as memory:
        before = memory.current_bytes
        first = torch.zeros(KIB)  # 4 KiB
        second = first + 1  # 4 KiB more
        del first
        third = torch.zeros(512)  # 2 KiB more, 4 less
        assert memory.current_bytes - before == 6 * KIB
        assert memory.peak_bytes - before == 8 * KIB
    assert second.sum() + third.sum() == KIB


def test_views_and_in_place_operators_cost_nothing() -> None:
    with track() as memory:
        tensor = torch.zeros(KIB)
        before = memory.current_bytes
        tensor.view(2, -1).add_(1)
        tensor[3:].mul_(2)
        assert memory.current_bytes == before


def test_what_is_alive_at_the_start_counts() -> None:
    tensor = torch.zeros(KIB * KIB)
    with track() as memory:
        assert memory.current_bytes >= tensor.nbytes


def test_activations_saved_for_the_backward_pass_count_until_they_are_freed() -> None:
    layer = torch.nn.Linear(64, 64)
    inputs = torch.randn(256, 64)
    with track() as memory:
        before = memory.current_bytes
        out = layer(inputs).relu().sum()  # relu keeps its 64 KiB output
        assert 64 * KIB <= memory.current_bytes - before < 72 * KIB
        out.backward()
        layer.zero_grad()
        del out
        assert memory.current_bytes == before


def test_peak_rss_is_in_bytes() -> None:
    assert 50 * KIB**2 < peak_rss_bytes() < 100 * KIB**3
