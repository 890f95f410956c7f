"""Operators of a step: counted on the meta device, timed on a real one."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lowmem_reft.memory.operators import Call, Stopwatch, overhead_s

CPU = torch.device("cpu")


def product(rows: int, inner: int, columns: int) -> Call:
    left, right = (
        torch.empty(rows, inner, device="meta"),
        torch.empty(columns, inner, device="meta"),
    )
    return Call.of(torch.ops.aten.mm.default, (left, right.T), {})


def test_the_work_of_a_product_is_two_operations_for_each_pair() -> None:
    assert product(3, 4, 5).work == 2 * 3 * 4 * 5


def test_a_part_of_a_large_operator_is_timed_for_the_whole() -> None:
    large = product(512, 2048, 4096)
    part, times = large.shrunk(1e8)
    assert part.work <= 1e8
    assert times * part.work == pytest.approx(large.work)
    left, right = part.args
    assert left.shape[1] == right.shape[0]
    assert right.stride[0] == 1  # the right one is transposed, as it was
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    heads = torch.empty(1, 2, 4096, 8, device="meta")
    part, times = Call.of(attention, (heads, heads, heads), {}).shrunk(1e8)
    assert part.args[0].shape == part.args[1].shape == (1, 2, 1024, 8)
    assert times == 16


def test_more_work_takes_longer_and_views_take_nothing() -> None:
    watch = Stopwatch(CPU)
    small, large = watch.seconds(Counter([product(8, 64, 64)])), 0.0
    large = watch.seconds(Counter([product(256, 512, 512)]))
    assert 0 < small < large
    view = Call.of(torch.ops.aten.view.default, (torch.empty(4, device="meta"), [2, 2]), {})
    assert watch.seconds(Counter([view])) == 0


def test_without_time_left_operators_are_estimated_by_their_kind() -> None:
    watch = Stopwatch(CPU)
    known = watch.seconds(Counter([product(64, 512, 512)]))
    watch._left_s = 0.0
    assert watch.seconds(Counter([product(64, 512, 1024)])) == pytest.approx(2 * known, rel=1e-3)


def test_an_operator_that_does_not_take_made_up_values_is_left_to_estimates() -> None:
    watch = Stopwatch(CPU)
    odd = Call.of(torch.ops.aten.view_as_complex_copy.default, (torch.empty(3, device="meta"),), {})
    assert watch.seconds(Counter([odd])) == 0
    assert isinstance(watch.failure, RuntimeError)


def test_python_takes_microseconds_between_operators_and_no_random_number() -> None:
    overhead_s.cache_clear()
    before = torch.get_rng_state()
    assert 0 <= overhead_s(CPU) < 1e-3
    assert torch.equal(before, torch.get_rng_state())


def test_devices_that_are_not_timed_are_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: object) -> None:
        pytest.fail("the card was begun")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", begun)
    overhead_s.cache_clear()
    overhead_s(CPU)
