"""The predicted time of a run: it follows the work, is about right, and never fails a run."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowmem_reft import cli
from lowmem_reft.memory import operators
from lowmem_reft.options import MethodOptions, TrainOptions, written
from lowmem_reft.runs.duration import Duration, in_words, predict_duration
from lowmem_reft.runs.resolve import resolve
from lowmem_reft.runs.score import ScoringSettings
from lowmem_reft.runs.train import run_training
from small_runs import small_run
from written import json_lines


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> TrainOptions:
    return written.changed(small_run(tiny_llama_dir, tmp_path), dry_run=True, reuse="off")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predict, and time steps, as if no other program computed on this machine."""
    monkeypatch.setattr(operators.Stopwatch, "slowdown", 1.0)
    clock = SimpleNamespace(perf_counter=time.process_time)
    monkeypatch.setattr("lowmem_reft.runs.fit.time", clock)


def with_rows(options: TrainOptions, path: Path, words: int, number: int = 8) -> TrainOptions:
    row = {"prompt": " ".join(["good"] * words), "response": "bad"}
    return written.changed(options, data=str(json_lines(path, *[row] * number)))


@pytest.mark.usefixtures("alone")
def test_longer_rows_and_more_epochs_take_longer(options: TrainOptions, tmp_path: Path) -> None:
    short = run_training(with_rows(options, tmp_path / "short.jsonl", 4))
    longer = with_rows(options, tmp_path / "long.jsonl", 100)
    assert run_training(longer)["predicted_s"] > short["predicted_s"] > 0
    more = written.changed(longer, epochs=20.0)
    assert run_training(more)["predicted_s"] > 5 * short["predicted_s"]


@pytest.mark.usefixtures("alone")
def test_reuse_is_predicted_to_be_faster(options: TrainOptions, tmp_path: Path) -> None:
    upper = with_rows(options, tmp_path / "rows.jsonl", 60)
    upper = written.changed(upper, layers="1", positions="l1", epochs=40.0)
    plain = run_training(upper)
    reused = run_training(written.changed(upper, reuse="trunk"))
    assert "for what is reused" in reused["time"]
    assert reused["predicted_s"] < plain["predicted_s"]


@pytest.mark.usefixtures("alone")
def test_a_step_takes_about_what_was_predicted(options: TrainOptions, tmp_path: Path) -> None:
    run = with_rows(options, tmp_path / "rows.jsonl", 40, number=16)
    said = run_training(run)
    done = run_training(written.changed(run, dry_run=False))
    predicted = said["predicted_s"] / said["num_steps"]
    assert 1 / 3 < done["step_time_s"] / predicted < 3


def test_what_other_programs_cost_is_counted_and_said(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators.Stopwatch, "slowdown", 1.0)
    alone = run_training(options)
    monkeypatch.setattr(operators.Stopwatch, "slowdown", 30.0)
    shared = run_training(options)
    assert shared["predicted_s"] > 6 * alone["predicted_s"]
    assert "30.0 times as slow as alone, as other programs compute too" in shared["time"]
    assert "other programs" not in alone["time"]


def test_validation_is_counted_and_generated_answers_are_said_not_to_be(
    options: TrainOptions, tmp_path: Path
) -> None:
    rows = json_lines(tmp_path / "new.jsonl", {"prompt": "is it?", "response": "bad"})
    scored = run_training(written.changed(options, validation_data=str(rows), metric="loss"))
    assert ", validation 2 x " in scored["time"]
    generated = written.changed(options, validation_data=str(rows), extractor="number")
    rows.write_text(json.dumps({"prompt": "is it?", "response": "3"}) + "\n")
    assert "without validation, for which answers are generated" in run_training(generated)["time"]


def test_the_time_is_in_the_json_of_a_dry_run_and_a_row_of_its_text(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    options = written.changed(options, quiet=False)
    assert cli.main(["train", *written.flags(written.changed(options, json=True))]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert isinstance(found["predicted_s"], float)
    assert found["time"].startswith("about ")
    assert f"time: {found['time']}" in err.splitlines()
    assert cli.main(["train", *written.flags(options)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["time", "about"] in [row[:2] for row in rows]


def test_a_device_that_cannot_be_timed_gives_no_time_and_says_why(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("the card is full")

    operators.overhead_s(torch.device("cpu"))  # which is kept
    monkeypatch.setattr(operators.Call, "run", full)
    said = run_training(options)
    assert said["predicted_s"] is None
    assert said["time"] == (
        "not predicted (no operator could be timed: OutOfMemoryError: the card is full)"
    )


def test_a_model_that_cannot_be_counted_is_trained_without_a_time(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise NotImplementedError("no such operator on the meta device")

    monkeypatch.setattr("lowmem_reft.runs.duration.count_operators", unknown)
    said = run_training(options)
    assert said["predicted_s"] is None
    assert "no such operator on the meta device" in said["time"]


def test_several_processes_are_not_predicted(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_reft.runs.duration.processes.num_processes", lambda: 2)
    assert run_training(options)["time"] == "not predicted (for several processes it is not)"


def test_no_random_number_is_drawn_so_that_a_quiet_run_has_the_same_classification_head(
    options: TrainOptions,
) -> None:
    lora = MethodOptions(method="lora", dropout=0.1)
    run = resolve(written.changed(options, method=lora))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert predict_duration(run, [], [], ScoringSettings()).predicted_s
    assert torch.equal(before, torch.get_rng_state())


def test_times_are_said_in_units_that_people_use() -> None:
    said = [in_words(seconds) for seconds in (0.0123, 0.0997, 0.4, 2.34, 45, 100, 1700, 9000)]
    assert said == ["12 ms", "100 ms", "400 ms", "2.3 s", "45 s", "1.7 min", "28 min", "2.5 h"]
    duration = Duration(num_steps=90, step_s=2.3, num_validations=3, validation_s=6.0)
    assert str(duration).startswith("about 3.7 min (90 steps of 2.3 s, validation 3 x 6.0 s); by ")
    assert replace(duration, validation_s=None).predicted_s == pytest.approx(207)
