"""A training run chooses how to fit into a budget of memory."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_reft.data.tokens import EncodedRows
from lowmem_reft.errors import InputError
from lowmem_reft.memory.planner import GIB, Card, plan, read_config
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
from lowmem_reft.runs import fitting
from lowmem_reft.runs.fitting import fit_into_memory, required_gib, setting_that_fits
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


def train_options(config_file: Path, memory_gib: float | None) -> TrainOptions:
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


def test_only_what_was_needed_to_fit_is_said_to_be(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(memory_gib: float) -> str:
        options = loud(train_options(config_file, memory_gib))
        options = replace(options, method=MethodOptions(layers="upper:0.5", positions="l1"))
        fit_into_memory(run_of(options, EXAMPLES))
        return capsys.readouterr().err

    assert said(8) == (
        "to fit into 8 GiB: nothing to change; there is room for --dequantize-upper on\n"
    )
    tight = said(40 / 1024)
    assert re.match(r"to fit into 0\.039\d* GiB: --batch-size \d --gradient-accumulation \d", tight)
    assert "--storage" not in tight


def test_training_fits_itself_into_a_budget_before_anything_is_loaded(config_file: Path) -> None:
    examples = [{"input_ids": [1] * 1024, "labels": [-100] * 960 + [1] * 64}]
    options = train_options(config_file, 40 / 1024)
    fitted = fit_into_memory(run_of(options, examples)).options
    assert fitted.optim.batch_size * fitted.optim.gradient_accumulation == 4
    assert (fitted.memory, fitted.optim.batch_size) != (MemoryOptions(), 4)
    with pytest.raises(InputError, match=r"memory_gib must be at least .* for examples of 1024"):
        fit_into_memory(run_of(train_options(config_file, 0.002), examples))


def free(mebibytes: float, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(name="this computer", memory_bytes=round(mebibytes * 2**20), context_bytes=0)
    monkeypatch.setattr(fitting, "free_card", lambda _: card)


EXAMPLES = [{"input_ids": [1] * 1024, "labels": [-100] * 960 + [1] * 64}]


def test_a_run_that_fits_into_what_is_free_stays_as_it_is(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(loud(train_options(config_file, None)), EXAMPLES)
    free(1e6, monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(fitting.Planner, "needed_bytes", lambda *_: pytest.fail("predicted"))
        assert fit_into_memory(run) is run  # there is far more than enough
    free(1.001 * 1024 * required_gib(run), monkeypatch)
    assert fit_into_memory(run) is run
    assert capsys.readouterr().err == ""


def loud(options: TrainOptions) -> TrainOptions:
    return replace(options, run=replace(options.run, quiet=False))


def test_a_run_that_does_not_fit_into_what_is_free_is_fitted_and_says_so(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = loud(train_options(config_file, None))
    free(40, monkeypatch)
    fitted = fit_into_memory(run_of(options, EXAMPLES)).options
    assert fitted.optim.batch_size * fitted.optim.gradient_accumulation == 4
    assert (fitted.memory, fitted.optim.batch_size) != (MemoryOptions(), 4)
    assert fitted.memory.memory_gib is None
    said = capsys.readouterr().err
    assert said.startswith("0.04 GiB are free on this computer and the run needs ")
    assert said.count("\n") == 1
    assert f"--batch-size {fitted.optim.batch_size} " in said
    other = replace(options, optim=replace(options.optim, optim="adamw_8bit"))
    assert fit_into_memory(run_of(other, EXAMPLES)).options.optim.optim == "adamw_8bit"


def test_a_run_that_cannot_fit_into_what_is_free_is_refused_unless_it_is_to_be_tried(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = train_options(config_file, None)
    free(2, monkeypatch)
    with pytest.raises(InputError, match=r"got 0\.00 free on this computer; .*; --no-fit runs it"):
        fit_into_memory(run_of(options, EXAMPLES))
    tried = run_of(replace(options, run=replace(options.run, no_fit=True)), EXAMPLES)
    assert fit_into_memory(tried) is tried


def test_a_run_whose_memory_cannot_be_predicted_goes_on_with_a_warning(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed_bytes(*_: Any) -> int:
        raise NotImplementedError("no such operator on the meta device")

    free(2, monkeypatch)
    monkeypatch.setattr(fitting.Planner, "needed_bytes", needed_bytes)
    run = run_of(train_options(config_file, None), EXAMPLES)
    with pytest.warns(UserWarning, match=r"cannot be predicted \(.*no such operator"):
        assert fit_into_memory(run) is run


def test_after_an_error_a_setting_is_named_that_takes_less(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = train_options(config_file, None)
    run = run_of(options, EXAMPLES)
    monkeypatch.setattr(fitting, "resolve", lambda _: run)
    free(1e6, monkeypatch)
    flags = setting_that_fits(options)
    assert flags is not None
    assert flags != "--storage nf4 --batch-size 4 --gradient-accumulation 1"
    free(2, monkeypatch)
    assert setting_that_fits(options) is None
