"""The best epoch on validation rows is kept, and scoring in between changes nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes
from lowmem_reft.options import (
    ChoosingOptions,
    DataOptions,
    EvaluateOptions,
    HeldOutOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    ScoringOptions,
    TrainOptions,
)
from lowmem_reft.reuse import prepare, reuse
from lowmem_reft.runs import fit, train
from lowmem_reft.runs.evaluate import run_evaluation
from lowmem_reft.runs.score import Scores
from lowmem_reft.runs.spent import Spent
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


def chosen_by(options: TrainOptions, **choosing: int) -> TrainOptions:
    return replace(options, choosing=ChoosingOptions(**choosing))


def test_a_run_ends_where_nothing_gets_better_and_is_finished(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = replace(options, optim=replace(options.optim, epochs=9))
    stopping = chosen_by(longer, patience=2)
    scores_of([0.2, 0.9, 0.5, 0.9], monkeypatch)  # as good as the best is not better
    result = run_training(stopping)
    assert (result["stopped_early"], result["num_steps"], result["best_epoch"]) == (True, 8, 2)
    assert (options.run.output_dir / "result.json").is_file()
    again = run_training(with_run(stopping, resume=True))
    names = ("stopped_early", "num_steps", "validation", "train_loss", "loss_history")
    assert {name: again[name] for name in names} == {name: result[name] for name in names}
    assert_same(weights(again), weights(result))
    # What has stopped goes on with more patience, to where it would have come at once.
    scores_of([0.3, 0.8], monkeypatch)
    more = run_training(with_run(chosen_by(longer, patience=4), resume=True))
    assert (more["num_steps"], len(more["validation"])) == (12, 6)
    assert_same(weights(more), weights(result))


def test_a_run_that_ends_with_its_last_step_has_not_stopped_early(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores_of([0.9, 0.5, 0.5], monkeypatch)
    result = run_training(chosen_by(options, patience=2))
    assert (result["stopped_early"], result["num_steps"]) == (False, 6)


@pytest.mark.parametrize("reuse", ["off", "prefix"])
def test_scoring_between_steps_changes_nothing_else_and_keeps_the_best(
    options: TrainOptions, tmp_path: Path, reuse: str
) -> None:
    options = replace(
        options,
        method=MethodOptions(rank=2, layers="1", positions="l1"),
        reuse=ReuseOptions(reuse=reuse),
    )
    plain = run_training(
        replace(with_run(options, output_dir=tmp_path / "plain"), held_out=HeldOutOptions())
    )
    scored = run_training(chosen_by(options, eval_steps=4))
    assert scored["reuse"] == plain["reuse"] == reuse
    assert (scored["train_loss"], scored["loss_history"]) == (
        plain["train_loss"],
        plain["loss_history"],
    )
    lines = scored["validation"]
    assert [(line["num_steps"], line["epoch"]) for line in lines] == [(4, 2), (6, 3)]


def test_an_interrupted_run_is_scored_every_so_many_steps_as_if_it_had_not_been(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = chosen_by(with_run(options, save_steps=2), eval_steps=1, patience=3)
    values = [0.4, 0.2, 0.9, 0.1, 0.5, 0.3]
    scores_of(values, monkeypatch)
    whole = run_training(with_run(options, output_dir=tmp_path / "whole"))
    assert [line["epoch"] for line in whole["validation"]] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert not whole["stopped_early"]

    def interrupt(watch: fit._StepWatch, args: object, state: object, control: object, **_: object):
        watch.interrupted = state.global_step == 3
        original(watch, args, state, control)

    original = fit._StepWatch.on_step_end
    scores_of(values, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(fit._StepWatch, "on_step_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_training(options)
    resumed = run_training(with_run(options, resume=True))
    times = {"train_time_s"}
    for one, two in zip(resumed["validation"], whole["validation"], strict=True):
        assert {n: one[n] for n in one.keys() - times} == {n: two[n] for n in two.keys() - times}
    assert resumed["best_epoch"] == whole["best_epoch"] == 1.5
    assert_same(weights(resumed), weights(whole))
    with pytest.raises(InputError, match="eval_steps 2 instead of 1"):
        run_training(with_run(chosen_by(options, eval_steps=2), resume=True))


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


def test_each_epoch_says_what_the_training_had_spent(
    options: TrainOptions, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    rows = [json.loads(line) for line in Path(options.data.data).read_text().splitlines()]
    rows[0]["prompt"] += " is the film good or bad?" * 3  # so that there is padding
    Path(options.data.data).write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = with_run(options, overwrite=True)
    options = replace(options, optim=replace(options.optim, packing="off"))
    texts = [f"{row['prompt']} {row['choices'][row['answer']]}" for row in rows]
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    padded = 6 * (max(lengths) + max(lengths[1:]))  # one of two batches of six has the long row
    for method, virtual in (("loreft", 0), ("prompt", 20), ("prefix", 0)):
        chosen = MethodOptions(method=method)
        result = run_training(replace(options, method=chosen))
        lines = result["validation"]
        assert [line["num_steps"] for line in lines] == [2, 4, 6]
        assert [line["num_real_tokens"] for line in lines] == [sum(lengths) * n for n in (1, 2, 3)]
        for number, line in enumerate(lines, start=1):
            assert line["num_computed_tokens"] == number * (padded + 12 * virtual)
        times = [line["train_time_s"] for line in lines]
        assert 0 < times[0] < times[1] < times[2] == result["train_time_s"]
    written = (options.run.output_dir / "epochs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == lines


def test_what_was_spent_counts_on_in_a_run_that_goes_on(options: TrainOptions) -> None:
    first = replace(options, optim=replace(options.optim, epochs=1))
    before = run_training(first)["validation"][0]
    for known in (True, False):
        epochs = 2 if known else 3
        longer = replace(options, optim=replace(options.optim, epochs=epochs))
        after = run_training(with_run(longer, resume=True))["validation"]
        assert after[0] == before
        assert after[1]["num_real_tokens"] == 2 * before["num_real_tokens"]
        assert after[1]["train_time_s"] > before["train_time_s"]
        # As a checkpoint of before has it, which says nothing of it.
        note = next(options.run.output_dir.glob("checkpoint-*/whole.json"))
        content = json.loads(note.read_text())
        del content["spent"], content["checksum"]
        note.write_text(json.dumps(content))
    assert after[2]["num_steps"] == 6
    assert (after[2]["num_computed_tokens"], after[2]["train_time_s"]) == (None, None)


def test_tokens_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = Spent(num_virtual=2)
    spent.count({"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])})
    spent.time_s = 1.5
    monkeypatch.setattr(processes, "everyones", lambda own: [own, [9.0, 30, 20]])
    wanted = {"train_time_s": 1.5, "num_computed_tokens": 6 + 4 + 30, "num_real_tokens": 5 + 20}
    assert spent.of_all() == wanted


def test_what_validation_reuses_is_stored_and_proven_once_in_a_run(
    options: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(where: Any, name: str) -> None:
        before = getattr(where, name)
        monkeypatch.setattr(
            where, name, lambda *a, **more: (calls.append(name), before(*a, **more))[1]
        )

    counted(reuse, "base_digest")
    counted(prepare, "prove_scores")
    exact = replace(options.model, storage="fp32", compute_dtype="fp32")
    options = replace(options, model=exact, method=MethodOptions(rank=2, positions="l1"))
    off = replace(options, reuse=ReuseOptions(reuse="off"))
    plain = run_training(with_run(off, output_dir=tmp_path / "plain"))["validation"]
    assert calls == []
    kept = ReuseOptions(reuse="prefix", reuse_dir=tmp_path / "kept")
    stored = run_training(replace(options, reuse=kept))["validation"]
    # Of the rows to train on and of those to validate; first, shortest, shortest with longest.
    assert [calls.count(name) for name in ("base_digest", "prove_scores")] == [2, 3]
    assert len(stored) == len(plain) == 3
    for one, other in zip(stored, plain, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
