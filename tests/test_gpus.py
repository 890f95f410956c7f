"""Cards are found by what people call them."""

from __future__ import annotations

import pytest

from lowmem_reft.errors import InputError
from lowmem_reft.memory.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a10", "a10"),
        ("NVIDIA A10", "a10"),
        ("RTX 4090", "4090"),
        ("NVIDIA GeForce RTX 3060", "3060"),
        ("A100-SXM4-80GB", "a100-80"),
        ("Tesla T4", "t4"),
        ("rtx 4060 ti 16 gb", "4060ti-16"),
        ("H200", "h200"),
    ],
)
def test_a_card_is_found_by_its_marketing_name(name: str, key: str) -> None:
    assert find_gpu(name) is GPUS[key]


def test_every_card_is_found_by_its_key_and_its_own_name() -> None:
    assert all(find_gpu(key) is gpu and find_gpu(gpu.name) is gpu for key, gpu in GPUS.items())


def test_cards_before_ampere_have_no_bf16() -> None:
    assert not find_gpu("t4").has_bf16
    assert find_gpu("a10").has_bf16


def test_an_unknown_card_is_refused_with_near_names_and_a_way_out() -> None:
    with pytest.raises(InputError, match=r"such as .*4090.*, got '4091'; or give .* --memory-gib"):
        find_gpu("4091")
