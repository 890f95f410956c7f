"""A training run chooses how to fit into a budget of memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_reft.data.tokens import EncodedRows
from lowmem_reft.errors import InputError
from lowmem_reft.memory.planner import GIB, plan, read_config
from lowmem_reft.memory.predict import Lengths
from lowmem_reft.methods.card import TrainingCard
from lowmem_reft.options import (
    DataOptions,
    MemoryOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    TrainOptions,
)
from lowmem_reft.runs.fitting import fit_into_memory, required_gib
from lowmem_reft.runs.resolve import Run


def run_of(options: TrainOptions, examples: list[dict[str, Any]]) -> Run:
    """A run on examples, of a base that is a configuration alone."""
    model = options.model.model
    return Run(
        options=options,
        card=TrainingCard(base=model, storage="nf4", compute_dtype="fp32"),
        config=read_config(model),
        compute_dtype=torch.float32,
        tokenizer=None,
        encoded=EncodedRows(examples=examples, num_cut_prompts=0, num_cut_tokens=0),
    )


def train_options(config_file: Path, memory_gib: float) -> TrainOptions:
    return TrainOptions(
        model=ModelOptions(model=str(config_file), device="cpu"),
        data=DataOptions(data="unread"),
        method=MethodOptions(method="loreft", rank=4, positions="f7+l7"),
        optim=OptimOptions(batch_size=4),
        memory=MemoryOptions(memory_gib=memory_gib),
        run=RunOptions(output_dir=config_file.parent, quiet=True),
    )


def test_upper_blocks_are_dequantized_where_the_budget_leaves_room(config_file: Path) -> None:
    examples = [{"input_ids": [1] * 256, "labels": [-100] * 192 + [1] * 64}]
    method = MethodOptions(layers="upper:0.5", positions="l1")

    def chosen(memory_gib: float, reuse: Any = "auto", dequantize_upper: Any = "auto") -> str:
        options = replace(
            train_options(config_file, memory_gib),
            method=method,
            reuse=ReuseOptions(reuse=reuse, dequantize_upper=dequantize_upper),
        )
        return fit_into_memory(run_of(options, examples)).options.reuse.dequantize_upper

    given = replace(train_options(config_file, 8), method=method)
    needed = required_gib(run_of(given, examples))
    lengths = Lengths(seq_len=256)
    found = plan(config_file, lengths=lengths, method=method, compute_dtype="fp32").reuse
    assert found is not None
    room = 1.1 * found.dequantized_bytes / GIB
    assert chosen(needed) == "off"
    assert chosen(needed + room) == "on"
    assert chosen(needed + room, dequantize_upper="off") == "off"
    assert chosen(needed, dequantize_upper="on") == "on"
    assert chosen(8, reuse="off") == "auto"  # nothing to decide


def test_training_fits_itself_into_a_budget_before_anything_is_loaded(config_file: Path) -> None:
    examples = [{"input_ids": [1] * 1024, "labels": [-100] * 960 + [1] * 64}]
    options = train_options(config_file, 40 / 1024)
    fitted = fit_into_memory(run_of(options, examples)).options
    assert fitted.optim.batch_size * fitted.optim.gradient_accumulation == 4
    assert (fitted.memory, fitted.optim.batch_size) != (MemoryOptions(), 4)
    with pytest.raises(InputError, match=r"memory_gib must be at least .* for examples of 1024"):
        fit_into_memory(run_of(train_options(config_file, 0.002), examples))
