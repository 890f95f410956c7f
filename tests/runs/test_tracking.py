"""What trackers are told of a run: its facts, memory, speed and scores; no network is used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils
from transformers.integrations.integration_utils import TensorBoardCallback

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    DataOptions,
    HeldOutOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    TrainOptions,
)
from lowmem_reft.runs.train import run_training


@pytest.fixture
def run(tiny_llama_dir: Path, films: Path, tmp_path: Path) -> TrainOptions:
    return TrainOptions(
        model=ModelOptions(model=str(tiny_llama_dir), storage="nf4", device="cpu"),
        data=DataOptions(data=str(films)),
        held_out=HeldOutOptions(eval_data=str(films), validation_data=str(films)),
        optim=OptimOptions(max_steps=2, batch_size=4),
        run=RunOptions(output_dir=tmp_path / "out", quiet=True, logging_steps=1),
    )


def test_tensorboard_has_the_losses_the_facts_and_the_final_figures(run: TrainOptions) -> None:
    result = run_training(replace(run, run=replace(run.run, report_to="tensorboard")))
    (directory,) = (run.run.output_dir / "runs").iterdir()
    events = EventAccumulator(str(directory)).Reload()
    scalars = events.Tags()["scalars"]
    assert len(events.Scalars("train/loss")) == 2
    for name, value in (
        ("final/peak_bytes", result["peak_bytes"]),
        ("final/tokens_per_s", result["tokens_per_s"]),
        ("final/validation_value", result["validation_value"]),
        ("final/eval/accuracy", result["eval"]["accuracy"]),
    ):
        assert f"train/{name}" in scalars
        assert events.Scalars(f"train/{name}")[0].value == pytest.approx(value)
    (text,) = events.Tensors("args/text_summary")
    facts = json.loads(text.tensor_proto.string_val[0])["lowmem_reft"]
    assert (facts["method"], facts["storage"], facts["template"]) == ("loreft", "nf4", "{prompt}")
    assert facts["data_digest"]
    assert facts["base_digest"]


class OtherTracker(TensorBoardCallback):  # stands for one that ends its run with the training
    calls: list[tuple[str, Any]] = []  # noqa: RUF012

    def __init__(self) -> None:
        pass

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append(("begin", args.to_dict()["lowmem_reft"]["method"]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.calls.append(("log", set(logs)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append(("end", kwargs["model"] is not None))


@pytest.mark.parametrize("fails", [False, True])
def test_a_tracker_is_ended_once_and_after_the_final_figures(
    run: TrainOptions, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    monkeypatch.setattr("lowmem_reft.options.values.find_spec", lambda _name: True)
    monkeypatch.setattr(OtherTracker, "calls", [])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", OtherTracker)
    options_ = replace(run, run=replace(run.run, report_to="trackio"))
    if fails:
        monkeypatch.setattr("lowmem_reft.runs.train._save_adapter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_training(options_)
    else:
        run_training(options_)
    kinds = [kind for kind, _ in OtherTracker.calls]
    assert kinds[0] == "begin"
    assert kinds.count("end") == 1
    assert OtherTracker.calls[-1] == ("end", True)
    last = OtherTracker.calls[-2][1]
    assert ({"final/peak_bytes", "final/eval/accuracy"} <= last) is not fails


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "report_to must be none, all or names among .*, got 'tensorbord'"),
        ("wandb", "report_to must name trackers that are installed, got 'wandb'; install wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_the_base_is_loaded(
    name: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("lowmem_reft.options.values.find_spec", lambda _name: None)
    with pytest.raises(InputError, match=message):
        RunOptions(output_dir=Path("out"), report_to=name)
    arguments = ["train", "--model", "m", "--data", "d.jsonl", "--output-dir", "out"]
    assert cli.main([*arguments, "--report-to", name]) == 2
    assert "report_to must" in capsys.readouterr().err
