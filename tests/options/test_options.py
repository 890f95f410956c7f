"""Values that break their rule are refused when they are given, in Python and from flags."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import get_scheduler

from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    OPTIMIZERS,
    SCHEDULES,
    TRACKERS,
    BaseOptions,
    ChatOptions,
    ChoosingOptions,
    CompareOptions,
    DataOptions,
    DecodingOptions,
    EvaluateOptions,
    ForgettingOptions,
    GenerateOptions,
    HeldOutOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    ReuseRemoveOptions,
    RowsOptions,
    RunOptions,
    ScoredOptions,
    ScoringOptions,
    TrainOptions,
)

REQUIRED = {
    DataOptions: {"data": "d"},
    RunOptions: {"output_dir": Path("out")},
    ReuseRemoveOptions: {"reuse_dir": Path("reuse")},
    EvaluateOptions: {"model": ModelOptions(model="m"), "data": DataOptions(data="d")},
    GenerateOptions: {"model": ModelOptions(model="m")},
    ChatOptions: {"model": ModelOptions(model="m")},
}
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "name", "wrong"),
    [
        (DataOptions, "max_length", [0, -1]),
        (DataOptions, "limit", [0]),
        (HeldOutOptions, "eval_limit", [0]),
        (MethodOptions, "rank", [0, -1]),
        (MethodOptions, "alpha", [0.0, -1.0]),
        (MethodOptions, "dropout", [-0.1, 1.0, NAN]),
        (OptimOptions, "epochs", [0.0, -1.0, INFINITY]),
        (OptimOptions, "max_steps", [0, -2]),
        (OptimOptions, "lr", [0.0, -1e-3, NAN, INFINITY]),
        (OptimOptions, "batch_size", [0]),
        (OptimOptions, "gradient_accumulation", [0]),
        (OptimOptions, "schedule", ["lineal", "reduce_lr_on_plateau"]),
        (OptimOptions, "warmup_ratio", [-0.1, 1.1, NAN]),
        (OptimOptions, "weight_decay", [-0.1, NAN]),
        (OptimOptions, "max_grad_norm", [0.0, -1.0]),
        (OptimOptions, "optim", ["adam"]),
        (RunOptions, "seed", [-1, 2**32]),
        (RunOptions, "save_steps", [0]),
        (RunOptions, "logging_steps", [0]),
        (RunOptions, "report_to", ["unknown", ""]),
        (ReuseRemoveOptions, "older_than_days", [0.0, -1.0, NAN]),
        (EvaluateOptions, "batch_size", [0]),
        (ScoringOptions, "max_new_tokens", [0]),
        (GenerateOptions, "batch_size", [0]),
        (GenerateOptions, "max_length", [0]),
        (ChatOptions, "max_length", [0]),
        (DecodingOptions, "max_new_tokens", [0]),
        (DecodingOptions, "temperature", [-1.0, NAN, INFINITY]),
        (DecodingOptions, "top_p", [0.0, -0.1, 1.1, NAN, 0.5]),
        (DecodingOptions, "seed", [-1]),
        (CompareOptions, "workers", [0]),
        (RowsOptions, "max_length", [0]),
        (ScoredOptions, "eval_limit", [0]),
        (ForgettingOptions, "forgetting_limit", [0, -1]),
    ],
)
def test_a_value_that_breaks_its_rule_is_refused_and_named(
    options: type, name: str, wrong: list[object]
) -> None:
    for value in wrong:
        with pytest.raises(InputError, match=rf"^{name} must be .*, got {value!r}; ."):
            options(**REQUIRED.get(options, {}), **{name: value})


def test_values_at_the_edge_of_their_rule_are_taken() -> None:
    OptimOptions(warmup_ratio=0.0, weight_decay=0.0, max_steps=1, epochs=0.01)
    OptimOptions(warmup_ratio=1.0)
    MethodOptions(rank=1, dropout=0.0)
    GenerateOptions(model=ModelOptions(model="m"), max_length=1)
    DecodingOptions(temperature=0.0, top_p=1.0)
    DecodingOptions(temperature=0.1, top_p=0.01, stop=("\n",))


@pytest.mark.parametrize(
    ("num_examples", "given", "epochs"),
    [
        (1, {}, 10),  # a step in each
        (80, {}, 10),
        (160, {}, 5),  # 20 steps in each
        (161, {}, 5),  # 21
        (264, {}, 4),  # 33
        (265, {}, 3),
        (100_000, {}, 3),
        (160, {"batch_size": 4}, 3),
        (160, {"gradient_accumulation": 2}, 10),
        (100, {"epochs": 0.5}, 0.5),
    ],
)
def test_few_rows_are_gone_through_more_often_where_no_epochs_are_given(
    num_examples: int, given: dict[str, Any], epochs: float
) -> None:
    options = OptimOptions(**given)
    assert options.num_epochs(num_examples) == epochs
    assert options.num_steps(num_examples) == replace(options, epochs=epochs).num_steps(
        num_examples
    )


def test_several_processes_take_fewer_steps_in_an_epoch() -> None:
    assert [OptimOptions().num_epochs(320, num_processes=n) for n in (1, 2, 4)] == [3, 5, 10]
    assert OptimOptions(max_steps=7).num_steps(320, num_processes=2) == 7


def test_no_general_text_is_scored_under_a_classification_head() -> None:
    scored = ScoredOptions(forgetting=ForgettingOptions(forgetting="wiki.txt"))
    with pytest.raises(InputError, match="forgetting must be left out with task_type SEQ_CLS, got"):
        CompareOptions(base=BaseOptions(task_type="SEQ_CLS"), scored=scored)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_that_is_offered_can_be_had(name: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), optim=name, use_cpu=True)
    assert issubclass(Trainer.get_optimizer_cls_and_kwargs(arguments)[0], torch.optim.Optimizer)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_that_is_offered_can_be_had(name: str, tmp_path: Path) -> None:
    TrainingArguments(str(tmp_path), lr_scheduler_type=name, use_cpu=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)


def test_every_tracker_of_transformers_is_offered_and_no_other() -> None:
    assert set(TRACKERS) == set(INTEGRATION_TO_CALLBACK)


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_reft.options.values.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"^report_to must .* got 'tensorboard'; install tensorb"):
        RunOptions(output_dir=Path("out"), report_to="none,tensorboard")
    RunOptions(output_dir=Path("out"), report_to="none")
    RunOptions(output_dir=Path("out"), report_to="all")


def test_a_tracker_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowmem_reft.options.values.find_spec", lambda name: name == "tensorboardX")
    RunOptions(output_dir=Path("out"), report_to="tensorboard")
    with pytest.raises(InputError, match="got 'wandb'; install wandb"):
        RunOptions(output_dir=Path("out"), report_to="tensorboard,wandb")


def test_what_chooses_an_adapter_needs_validation_rows(tmp_path: Path) -> None:
    for choosing in (ChoosingOptions(patience=2), ChoosingOptions(eval_steps=5)):
        with pytest.raises(InputError, match=r"(patience|eval_steps) must come with validation_da"):
            TrainOptions(
                model=ModelOptions(model="m"),
                data=DataOptions(data="rows.jsonl"),
                choosing=choosing,
                run=RunOptions(output_dir=tmp_path),
            )


def test_directories_that_are_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="reuse_dir must be a directory, got the file"):
        ReuseOptions(reuse_dir=file)
    with pytest.raises(InputError, match="output_dir must be a directory, got the file"):
        RunOptions(output_dir=file)
    with pytest.raises(InputError, match="reuse must be auto, prefix or trunk"):
        ReuseOptions(resident="upper", reuse="off")


def test_what_is_for_training_alone_is_refused_in_evaluate() -> None:
    for value in ("auto", "off"):
        EvaluateOptions(**REQUIRED[EvaluateOptions], reuse=ReuseOptions(dequantize_upper=value))
    with pytest.raises(InputError, match="dequantize_upper must be auto or off in evaluate"):
        EvaluateOptions(**REQUIRED[EvaluateOptions], reuse=ReuseOptions(dequantize_upper="on"))


def test_a_new_line_in_a_stop_text_can_be_typed() -> None:
    assert DecodingOptions(stop=("\\n\\n", "end")).stop_texts == ("\n\n", "end")
