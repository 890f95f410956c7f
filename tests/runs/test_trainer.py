"""A run ends at the first number that is not finite; one that goes on follows its schedule."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_reft.errors import InputError
from lowmem_reft.options import HeldOutOptions, MethodOptions
from lowmem_reft.runs import fit, train
from lowmem_reft.runs.finite import check_weights, rows_of
from lowmem_reft.runs.resolve import resolve
from lowmem_reft.runs.train import run_training
from lowmem_reft.runs.trainer import RunMixin
from lowmem_reft.runs.validation import _rank
from small_runs import adapter_of, small_run, with_optim, with_run


@pytest.mark.parametrize("method", ["loreft", "lora"])
def test_a_run_that_diverges_ends_with_the_step_and_leaves_no_adapter(
    tiny_llama_dir: Path, tmp_path: Path, method: str
) -> None:
    options = small_run(tiny_llama_dir, tmp_path)
    options = with_optim(replace(options, method=MethodOptions(method=method)), lr=1e30)
    with pytest.raises(InputError, match=r"must be finite, got nan or inf .*lower lr \(now 1e\+30"):
        run_training(options)
    assert not (options.run.output_dir / "adapter").exists()
    assert not (options.run.output_dir / "result.json").exists()


@pytest.mark.parametrize("broken", ["loss", "gradient"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_step_and_its_rows_are_named_where_a_loss_or_a_gradient_is_not_finite(
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    accumulation: int,
) -> None:
    original = RunMixin.training_step

    def breaking(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 2 and len(self._batches) == 1:  # only the first of its parts
            if broken == "loss":
                return loss * math.inf
            trained = next(p for p in self.model.parameters() if p.requires_grad)
            trained.grad.flatten()[0] = math.nan
        return loss

    monkeypatch.setattr(RunMixin, "training_step", breaking)
    options = with_optim(
        small_run(tiny_llama_dir, tmp_path),
        batch_size=2 // accumulation,
        gradient_accumulation=accumulation,
    )
    said = rf"{broken} must be finite, got nan or inf at step 3 of 4 \(rows \d, \d of data\)"
    with pytest.raises(InputError, match=said):
        run_training(options)
    checkpoints = [path.name for path in options.run.output_dir.glob("checkpoint-*")]
    assert checkpoints == ["checkpoint-2"]
    monkeypatch.undo()
    run_training(with_run(options, resume=True))
    whole = with_run(options, output_dir=tmp_path / "whole")
    run_training(whole)
    assert adapter_of(options) == adapter_of(whole)


def test_weights_that_only_the_last_step_broke_are_not_saved(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fit._StepWatch.on_step_end

    def breaking(watch: Any, args: Any, state: Any, control: Any, model: Any, **more: Any) -> None:
        original(watch, args, state, control)
        if state.global_step == state.max_steps:
            trained = next(p for p in model.parameters() if p.requires_grad)
            trained.data.flatten()[0] = math.inf

    monkeypatch.setattr(fit._StepWatch, "on_step_end", breaking)
    for save_steps in (1, None):
        name = f"run-{save_steps}"
        options = with_run(
            small_run(tiny_llama_dir, tmp_path), save_steps=save_steps, output_dir=tmp_path / name
        )
        with pytest.raises(InputError, match="weights must be finite, got nan or inf after"):
            run_training(options)
        assert not (tmp_path / name / "adapter").exists()
        assert not (tmp_path / name / "checkpoint-4").exists()


@pytest.mark.parametrize("which", ["validation_data", "eval_data"])
def test_a_loss_on_held_out_rows_that_is_not_finite_ends_the_run(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    class Scored:
        def summary(self) -> dict[str, Any]:
            return {"metric": "accuracy", "value": 0.5, "loss": math.nan}

    monkeypatch.setattr(train, "score", lambda *_: Scored())
    options = small_run(tiny_llama_dir, tmp_path)
    options = replace(options, held_out=HeldOutOptions(**{which: options.data.data}))
    with pytest.raises(InputError, match=f"loss on {which} must be finite"):
        run_training(options)


def test_a_metric_that_is_not_a_number_is_never_the_best() -> None:
    values = (math.nan, 0.1, math.nan, None, 0.2)
    lines = [{"epoch": n, "value": v, "loss": None} for n, v in enumerate(values)]
    assert max(lines, key=_rank)["value"] == 0.2
    assert max(reversed(lines), key=_rank)["value"] == 0.2


def test_rows_are_found_by_their_tokens_whatever_the_padding() -> None:
    examples = [{"input_ids": ids} for ids in ([1, 2], [3], [4, 5], [3])]
    ids, mask = torch.tensor([[0, 3], [4, 5]]), torch.tensor([[0, 1], [1, 1]])
    assert rows_of({"input_ids": ids, "attention_mask": mask}, examples) == [2, 3, 4]
    assert rows_of({"input_ids": ids}, examples) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_storages_are_counted_and_is_not_lost(number: signal.Signals) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    counted = []

    def count() -> None:
        with fit._signals_waiting():
            os.kill(os.getpid(), number)
            time.sleep(0.05)  # until another thread has taken it
            counted.append(True)

    before = signal.signal(number, end)
    done = threading.Event()
    other = threading.Thread(target=done.wait)  # which the system may give the signal to
    other.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            count()
    finally:
        signal.signal(number, before)
        done.set()
        other.join()
    assert counted


def test_frozen_weights_are_not_looked_at(tiny_llama_dir: Path, tmp_path: Path) -> None:
    run = resolve(small_run(tiny_llama_dir, tmp_path))
    model = torch.nn.Linear(2, 2)
    model.weight.data[0, 0] = math.nan
    model.weight.requires_grad_(False)
    check_weights(model, "here", run)
    model.weight.requires_grad_(True)
    with pytest.raises(InputError, match="weights must be finite"):
        check_weights(model, "here", run)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_goes_on_for_longer_follows_the_longer_schedule_from_its_first_step_and_says_so(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], schedule: str
) -> None:
    options = with_run(small_run(tiny_llama_dir, tmp_path), quiet=False)
    options = with_optim(options, schedule=schedule)
    longer = with_optim(options, epochs=4)
    run_training(with_run(longer, output_dir=tmp_path / "whole"))
    rates = _rates(capsys.readouterr().err)
    run_training(options)
    capsys.readouterr()
    run_training(with_run(longer, resume=True))
    said = capsys.readouterr().err
    assert _rates(said) == rates[4:]
    assert "follows the schedule of 8 steps from step 5 on; up to there it was that of 4" in said


def _rates(said: str) -> list[str]:
    return re.findall(r"^step \S+ loss \S+ lr (\S+) ", said, re.MULTILINE)


def test_a_run_that_max_steps_ended_inside_an_epoch_takes_no_further_step_when_resumed(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    options = with_optim(small_run(tiny_llama_dir, tmp_path), max_steps=3)
    run_training(options)
    first = adapter_of(options)
    assert run_training(with_run(options, resume=True))["num_steps"] == 3
    assert adapter_of(options) == first
