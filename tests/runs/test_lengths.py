"""Batches of like lengths: what an epoch holds, how little is padding, what a run makes of it."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from lowmem_reft.options import MethodOptions
from lowmem_reft.runs.lengths import LikeLengths
from lowmem_reft.runs.train import run_training
from small_runs import small_run, with_optim, with_run


def lengths_of(number: int) -> list[int]:
    draw = random.Random(0)
    return [draw.randrange(5, 200) for _ in range(number)]


def batches(lengths: list[int], size: int, *, epoch: int = 0, seed: int = 0) -> list[list[int]]:
    sampler = LikeLengths(lengths, size, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_nine_tenths_of_what_is_computed_are_tokens_where_it_was_half() -> None:
    lengths = lengths_of(1003)
    found = batches(lengths, 8)
    computed = sum(len(batch) * max(lengths[index] for index in batch) for batch in found)
    assert sum(lengths) / computed > 0.9
    assert len(found[-1]) == 3
    # Long and short batches follow each other as it comes.
    means = [sum(lengths[index] for index in batch) / len(batch) for batch in found]
    assert sum(abs(a - b) for a, b in pairwise(means)) / len(means) > 40


def test_each_epoch_and_seed_has_its_own_order_and_always_the_same() -> None:
    lengths = lengths_of(100)
    orders = [
        batches(lengths, 4, epoch=epoch, seed=seed) for epoch in range(2) for seed in range(2)
    ]
    assert len({str(order) for order in orders}) == 4
    assert batches(lengths, 4, epoch=1, seed=1) == orders[3]
    together = [{frozenset(batch) for batch in order} for order in orders]
    assert not together[0] & together[2]


def test_examples_of_one_length_and_fewer_than_a_batch_are_all_taken() -> None:
    assert len(batches([7] * 50, 8)) == 7
    assert batches([3, 1, 2], 8) == [[1, 2, 0]]


def test_a_run_computes_less_padding_from_a_store_as_well(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    options = small_run(tiny_llama_dir, tmp_path, validated=True)
    rows = [{"prompt": "cat " * (1 + 7 * (i % 5)), "response": "dog"} for i in range(40)]
    Path(options.data.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = replace(options, method=MethodOptions(positions="l2", layers="upper:0.5"))
    shares, losses = [], []
    for by_length, reuse in ((False, "off"), (True, "off"), (True, "trunk")):
        changed = with_optim(options, group_by_length=by_length, packing="off")
        changed = replace(changed, reuse=replace(options.reuse, reuse=reuse))
        result = run_training(with_run(changed, output_dir=tmp_path / f"{by_length}{reuse}"))
        (*_, last) = result["validation"]
        assert result["reuse"] == reuse
        shares.append(last["num_real_tokens"] / last["num_computed_tokens"])
        losses.append([loss for _, loss in result["loss_history"]])
    assert shares[0] < 0.8
    assert shares[1] == shares[2] > 0.9
    assert losses[0] != losses[1]
    assert all(abs(a - b) < 1e-4 for a, b in zip(losses[1], losses[2], strict=True))
