"""The catalogue of cards, and how a card is found by the names people and drivers give it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem_reft import InputError
from lowmem_reft.memory.cards import CONTEXT_BYTES, FRAGMENTATION, GPUS, _plain, find_gpu
from lowmem_reft.memory.planner import Card

DRIVER_NAMES = {
    "NVIDIA A10": "a10",
    "NVIDIA A10G": "a10g",
    "NVIDIA A40": "a40",
    "NVIDIA A100-SXM4-80GB": "a100-80",
    "NVIDIA A100-SXM4-40GB": "a100-40",
    "NVIDIA A100 80GB PCIe": "a100-80",
    "NVIDIA A100-PCIE-40GB": "a100-40",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "Tesla T4": "t4",
    "Tesla V100-SXM2-16GB": "v100-16",
    "Tesla V100-SXM2-32GB": "v100-32",
    "NVIDIA RTX A6000": "a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx6000-ada",
    "NVIDIA GeForce RTX 2080 Ti": "2080ti",
    "NVIDIA GeForce RTX 3060": "3060",
    "NVIDIA GeForce RTX 4070 Ti SUPER": "4070ti-super",
    "NVIDIA GeForce RTX 4090": "4090",
    "NVIDIA GeForce RTX 5070 Ti": "5070ti",
    "NVIDIA GeForce RTX 3060 Laptop GPU": "3060-laptop",
    "NVIDIA GeForce RTX 4080 Laptop GPU": "4080-laptop",
}


@pytest.mark.parametrize("key", GPUS)
@pytest.mark.parametrize("write", [str, str.upper, "RTX {}".format, "NVIDIA {} GPU".format])
def test_a_card_is_found_by_its_key_however_it_is_written(key, write):
    assert find_gpu(write(key)) is GPUS[key]
    assert find_gpu(write(key).replace("-", " ")) is GPUS[key]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_a_card_is_found_by_the_name_on_its_box(gpu):
    assert find_gpu(gpu.name) is gpu
    assert find_gpu(gpu.name.replace(" GB", "GB")) is gpu
    assert find_gpu(f"NVIDIA GeForce {gpu.name}") is gpu


@pytest.mark.parametrize(("name", "key"), DRIVER_NAMES.items())
def test_a_card_is_found_by_the_name_the_driver_gives_it(name, key):
    assert find_gpu(name) is GPUS[key]


@pytest.mark.parametrize(
    "name",
    ["A100", "V100", "RTX 3060 8GB", "4090 48GB", "GB200", "RTX 6000", "T400", "H100 MIG", ""],
)
def test_a_name_that_may_be_another_card_is_not_taken_for_one(name):
    with pytest.raises(InputError, match=r"gpu must be a card that is known, got '.*'; choose one"):
        find_gpu(name)


def test_an_unknown_card_is_answered_with_near_names_and_the_other_way():
    with pytest.raises(InputError, match=r"got 'A100'.* a100-40, a100-80.*--memory-gib"):
        find_gpu("A100")
    with pytest.raises(InputError, match=r"got '4091'.* 4090"):
        find_gpu("4091")
    with pytest.raises(InputError, match=r"such as 4060ti, 4060ti-16"):
        find_gpu("RTX 4060 Ti 32 GB")


def test_no_two_cards_answer_to_one_name():
    names = [{_plain(key), _plain(gpu.name)} for key, gpu in GPUS.items()]
    assert sum(map(len, names)) == len(set().union(*names))


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_memory_is_what_the_box_says_less_what_the_driver_keeps(gpu):
    on_the_box_gb = int(gpu.name.split()[-2])
    # The H200's and the H100 NVL's are decimal; error correction on GDDR6 takes a sixteenth.
    assert 0.92 * on_the_box_gb <= gpu.memory_mib / 1024 <= 1.002 * on_the_box_gb


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_torch_has_a_little_less_and_no_report_has_less_than_is_assumed(gpu):
    kept = 1 - gpu.torch_bytes / (gpu.memory_mib * 2**20)
    assert 0.008 < kept < 0.06
    assumed = replace(gpu, torch_gib=None).torch_bytes
    assert gpu is GPUS["t4"] or assumed <= gpu.torch_bytes


@pytest.mark.parametrize(("key", "gib"), [("3060", 11.75), ("4060", 7.75)])
def test_a_card_is_planned_with_what_torch_has_of_it(key, gib):
    card = Card.find(gpu=key)
    assert card is not None
    assert card.memory_bytes == round(gib * 2**30)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_figures_are_in_the_units_that_they_claim(gpu):
    assert 150 < gpu.bandwidth_gb_s < 10_000
    assert 10 < gpu.tflops_16bit < 3_000
    # Products per byte read: a slipped digit in either falls out of what has ever been built.
    assert 50 < gpu.tflops_16bit * 1000 / gpu.bandwidth_gb_s < 450


def test_bf16_begins_with_ampere():
    without = {key for key, gpu in GPUS.items() if not gpu.has_bf16}
    assert without == {"t4", "v100-16", "v100-32", "2080ti"}


def test_the_stated_overheads_are_half_a_gib_and_two_percent():
    assert (CONTEXT_BYTES, FRAGMENTATION) == (512 * 2**20, 0.02)
