"""What a training says as it goes on: lines on a pipe, a bar on a terminal, no dictionary."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_reft.runs.said import Reports
from lowmem_reft.runs.spent import Spent

LOSS = {"loss": 1.23456, "grad_norm": 0.5, "learning_rate": 9e-4, "epoch": 1.0}
LAST = {"train_runtime": 3.0, "train_loss": 1.0, "epoch": 2.0}
FIRST = {"epoch": 1.0, "metric": "accuracy", "value": 0.75, "loss": 0.5}
SECOND = {"epoch": 2.0, "metric": "accuracy", "value": 0.5, "loss": None}


def two_epochs(reports: Reports, spent: Spent) -> None:
    state: Any = SimpleNamespace(global_step=0, max_steps=20, is_world_process_zero=True)
    with reports:
        reports.on_train_begin(None, state, None)
        for line in (FIRST, SECOND):
            state.global_step += 10
            spent.time_s += 5.0
            reports.on_step_end(None, state, None)
            reports.on_log(None, state, None, logs=dict(LOSS))
            with reports.paused():
                pass
            reports.score(line, FIRST)
        reports.on_log(None, state, None, logs=dict(LAST))
        reports.on_train_end(None, state, None)


def test_on_a_pipe_losses_and_scores_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_reft.runs.said.peak_so_far_bytes", lambda: 3 * 2**29)
    spent = Spent()
    two_epochs(Reports(spent, quiet=False), spent)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "step 10/20 loss 1.235 lr 9.0e-04 2 steps/s peak 1.50 GiB, 0:00:00 left",
        "epoch 1 accuracy 0.7500 loss 0.5000 best 0.7500 (epoch 1)",
        "step 20/20 loss 1.235 lr 9.0e-04 2 steps/s peak 1.50 GiB",
        "epoch 2 accuracy 0.5000 best 0.7500 (epoch 1)",
    ]


def test_a_loss_that_is_the_score_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = {"epoch": 0.5, "metric": "loss", "value": 1.5, "loss": 1.5}
    Reports(Spent(), quiet=False).score(line, line)
    assert capsys.readouterr().err == "epoch 0.5 loss 1.5000 best 1.5000 (epoch 0.5)\n"


def test_on_a_terminal_there_is_one_bar_which_goes_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # what makes a pipe a terminal for rich
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    spent = Spent()
    two_epochs(Reports(spent, quiet=False), spent)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"training .*20/20 loss 1\.235 2 steps/s, \d:\d\d:\d\d left", err)
    assert err.count("epoch 1 accuracy") == 1
    assert err.rstrip().endswith("step 20/20 loss 1.235 2 steps/s")
    assert not re.search(r"\x1b\[(\d+;)*3\d", err)  # NO_COLOR
    assert "{" not in err


def test_a_bar_does_not_outlive_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    state: Any = SimpleNamespace(global_step=0, max_steps=20, is_world_process_zero=True)
    reports = Reports(Spent(), quiet=False)

    def fail() -> None:
        with reports:
            reports.on_train_begin(None, state, None)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    before = capsys.readouterr().err
    reports.on_step_end(None, state, None)
    assert before
    assert capsys.readouterr().err == ""


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    spent = Spent()
    two_epochs(Reports(spent, quiet=True), spent)
    assert capsys.readouterr() == ("", "")
