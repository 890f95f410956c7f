"""The best epoch on validation rows is kept, and scoring in between changes nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowmem_reft.errors import InputError
from lowmem_reft.options import (
    DataOptions,
    EvaluateOptions,
    HeldOutOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    RunOptions,
    ScoringOptions,
    TrainOptions,
)
from lowmem_reft.runs import fit, train
from lowmem_reft.runs.evaluate import run_evaluation
from lowmem_reft.runs.score import Scores
from lowmem_reft.runs.train import run_training

ROWS = [
    {"prompt": f"is it {n % 3}?", "choices": ["yes", "no"], "answer": n % 3 != 0} for n in range(12)
]


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> TrainOptions:
    """Two steps an epoch at one learning rate: n epochs are the beginning of n + 1."""
    rows = tmp_path / "rows.jsonl"
    lines = (json.dumps({**row, "answer": int(row["answer"])}) + "\n" for row in ROWS)
    rows.write_text("".join(lines))
    return TrainOptions(
        model=ModelOptions(model=str(tiny_llama_dir), device="cpu"),
        data=DataOptions(data=str(rows)),
        held_out=HeldOutOptions(validation_data=str(rows), validation_limit=6),
        method=MethodOptions(rank=2, positions="all"),
        optim=OptimOptions(epochs=3, batch_size=6, lr=1e-2, schedule="constant", warmup_ratio=0),
        run=RunOptions(output_dir=tmp_path / "run", quiet=True),
    )


def with_run(options: TrainOptions, **changes: object) -> TrainOptions:
    return replace(options, run=replace(options.run, **changes))


def weights(result: dict) -> dict[str, torch.Tensor]:
    return load_file(Path(result["adapter_dir"], "adapter_model.safetensors"))


def assert_same(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def scores_of(values: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the epochs score these values."""
    left = iter(values)

    def score(*_: object) -> Scores:
        right = round(next(left) * 10)
        answers = [0] * right + [1] * (10 - right)
        return Scores(predictions=answers, references=[0] * 10, correct=[a == 0 for a in answers])

    monkeypatch.setattr(train, "score", score)


@pytest.mark.parametrize("method", ["loreft", "qlora"])
def test_the_adapter_is_that_of_the_best_epoch(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options = replace(options, method=MethodOptions(method=method, rank=2))
    shorter = replace(
        with_run(options, output_dir=tmp_path / "shorter"),
        held_out=HeldOutOptions(),
        optim=replace(options.optim, epochs=2),
    )
    scores_of([0.2, 0.9, 0.5], monkeypatch)
    best = run_training(options)
    assert (best["best_epoch"], best["validation_value"]) == (2, 0.9)
    assert [line["value"] for line in best["validation"]] == [0.2, 0.9, 0.5]
    assert_same(weights(best), weights(run_training(shorter)))


def test_a_finished_run_goes_on_and_keeps_its_best_epoch(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_of([0.2, 0.9, 0.5, 0.4], monkeypatch)
    finished = run_training(options)
    kept = weights(finished)
    for epochs in (3, 4):
        longer = replace(options, optim=replace(options.optim, epochs=epochs))
        again = run_training(with_run(longer, resume=True))
        assert (again["best_epoch"], len(again["validation"])) == (2, epochs)
        assert_same(weights(again), kept)


def test_of_equal_epochs_the_first_is_kept(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_of([0.5, 0.5, 0.5], monkeypatch)
    assert run_training(options)["best_epoch"] == 1


TEXTS = [
    {"prompt": f"say {word}:", "response": f"the {word} dog jumps over the lazy {word}"}
    for word in ("quick", "brown", "little", "good", "bad", "two")
]


def of_texts(options: TrainOptions, tmp_path: Path, **scoring: Any) -> TrainOptions:
    """The run on free text, at a rate that makes the second epoch better than the first."""
    rows = tmp_path / "texts.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    return replace(
        options,
        data=DataOptions(data=str(rows)),
        held_out=HeldOutOptions(validation_data=str(rows)),
        scoring=ScoringOptions(max_new_tokens=4, **scoring),
        optim=replace(options.optim, epochs=2),
    )


@pytest.mark.parametrize(
    ("scoring", "metric"),
    [
        ({}, "loss"),
        ({"metric": "loss"}, "loss"),
        ({"scoring": "generation"}, "accuracy"),
        ({"metric": "exact_match"}, "exact_match"),
    ],
)
def test_of_free_text_the_epoch_with_the_lowest_loss_is_kept(
    options: TrainOptions, tmp_path: Path, scoring: dict, metric: str
) -> None:
    result = run_training(of_texts(options, tmp_path, **scoring))
    first, second = result["validation"]
    assert second["loss"] < first["loss"]
    assert first["metric"] == metric
    assert first["value"] == (first["loss"] if metric == "loss" else 0)
    assert result["best_epoch"] == 2


def test_scoring_between_epochs_does_not_change_the_training(
    options: TrainOptions, tmp_path: Path
) -> None:
    scored = run_training(options)
    plain = run_training(
        replace(with_run(options, output_dir=tmp_path / "plain"), held_out=HeldOutOptions())
    )
    assert scored["train_loss"] == plain["train_loss"]
    assert scored["loss_history"] == plain["loss_history"]


def test_the_kept_adapter_scores_what_its_epoch_scored(options: TrainOptions) -> None:
    result = run_training(options)
    scored = run_evaluation(
        EvaluateOptions(
            model=options.model,
            data=replace(options.data, limit=6),
            adapter=Path(result["adapter_dir"]),
            quiet=True,
        )
    )
    best = max(result["validation"], key=lambda line: (line["value"], -line["loss"]))
    assert best["epoch"] == result["best_epoch"]
    assert scored["value"] == result["validation_value"] == best["value"]
    assert scored["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_an_interrupted_run_keeps_its_best_epoch(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_of([0.9, 0.1, 0.5], monkeypatch)
    whole = run_training(with_run(options, output_dir=tmp_path / "whole"))

    def interrupt(watch: fit._StepWatch, args: object, state: object, control: object, **_: object):
        original(watch, args, state, control)
        if state.global_step == 3:
            watch.interrupted = control.should_save = control.should_training_stop = True

    original = fit._StepWatch.on_step_end
    scores_of([0.9, 0.1, 0.5], monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(fit._StepWatch, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_training(options)
    resumed = run_training(with_run(options, resume=True))
    assert resumed["best_epoch"] == whole["best_epoch"] == 1
    assert [line["value"] for line in resumed["validation"]] == [0.9, 0.1, 0.5]
    assert_same(weights(resumed), weights(whole))


def test_a_new_run_forgets_the_epochs_of_an_old_one(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_of([0.9, 0.9, 0.9, 0.1, 0.3, 0.2], monkeypatch)
    run_training(options)
    again = run_training(options)
    assert (again["best_epoch"], len(again["validation"])) == (2, 3)


def test_a_wrong_validation_file_is_refused_before_the_training(options: TrainOptions) -> None:
    held_out = HeldOutOptions(validation_data="nowhere.jsonl")
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        run_training(replace(options, held_out=held_out))
    assert not options.run.output_dir.exists()
