"""Training runs: what comes out, resuming, reproducibility, interruption."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowmem_reft.errors import InputError
from lowmem_reft.methods.card import find_adapter, load_card
from lowmem_reft.options import (
    DataOptions,
    EvaluateOptions,
    HeldOutOptions,
    MemoryOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    ScoringOptions,
    TrainOptions,
)
from lowmem_reft.reuse.reuse import Reuse
from lowmem_reft.runs.fit import _cuda_peak, _training_arguments
from lowmem_reft.runs.resolve import resolve
from lowmem_reft.runs.train import run_training
from warm import warm_processes

ROWS = [
    {"prompt": f"is the {noun} good or bad? label:", "choices": ["good", "bad"], "answer": answer}
    for noun, answer in [("cat", 0), ("dog", 1), ("fox", 0), ("film", 1), ("time", 0), ("fou", 1)]
    for _ in range(2)
]


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> TrainOptions:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TrainOptions(
        model=ModelOptions(model=str(tiny_llama_dir), compute_dtype="fp32", device="cpu"),
        data=DataOptions(data=str(data)),
        method=MethodOptions(positions="f2+l2"),
        optim=OptimOptions(epochs=2, batch_size=3, lr=1e-2),
        run=RunOptions(output_dir=tmp_path / "out", quiet=True, logging_steps=1),
    )


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_same_adapter(first: Path, second: Path) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def with_run(options: TrainOptions, **changes: object) -> TrainOptions:
    return replace(options, run=replace(options.run, **changes))


def test_a_run_lowers_the_loss_and_reports_what_scripts_rely_on(options: TrainOptions) -> None:
    result = run_training(replace(options, optim=replace(options.optim, epochs=12)))
    history = [loss for _, loss in result["loss_history"]]
    assert sum(history[-4:]) < 0.7 * sum(history[:4])
    for key in ("train_loss", "step_time_s", "tokens_per_s", "peak_bytes", "rss_bytes"):
        assert result[key] > 0, key
    assert result["num_trainable_params"] == 4 * (2 * 64 * 8 + 8)
    assert Path(result["adapter_dir"], "adapter_model.safetensors").is_file()
    assert json.loads((options.run.output_dir / "result.json").read_text())["num_steps"] == 48


@pytest.mark.parametrize("method", ["loreft", "qlora"])
def test_two_runs_with_one_seed_give_the_same_adapter_bitwise(
    options: TrainOptions, tmp_path: Path, method: str
) -> None:
    options = replace(options, method=MethodOptions(method=method, dropout=0.1))
    first = run_training(options)
    second = run_training(with_run(options, output_dir=tmp_path / "again"))
    assert_same_adapter(Path(first["adapter_dir"]), Path(second["adapter_dir"]))
    other = run_training(with_run(options, output_dir=tmp_path / "other", seed=1))
    assert other["train_loss"] != first["train_loss"]


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(
    options: TrainOptions, tmp_path: Path
) -> None:
    whole = replace(options, optim=replace(options.optim, batch_size=6, max_steps=2))
    split = replace(
        with_run(options, output_dir=tmp_path / "split"),
        optim=replace(options.optim, batch_size=2, gradient_accumulation=3, max_steps=2),
    )
    first, second = run_training(whole), run_training(split)
    one, two = weights(Path(first["adapter_dir"])), weights(Path(second["adapter_dir"]))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batches", [{}, {"group_by_length": True}, {"packing": "on"}])
def test_a_killed_run_resumes_to_the_same_adapter_bitwise(
    options: TrainOptions, tmp_path: Path, batches: dict[str, Any]
) -> None:
    options = replace(options, method=replace(options.method, dropout=0.1))
    options = replace(options, optim=replace(options.optim, **batches))
    options = with_run(options, save_steps=3)
    whole = run_training(with_run(options, output_dir=tmp_path / "whole"))
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys, torch\n"
        "from transformers import TrainerCallback\n"
        "from lowmem_reft.runs import fit, train\n"
        "from lowmem_reft.options import *\n"
        "from pathlib import Path, PosixPath\n"
        "torch.set_num_threads(1)\n"
        "original = fit._StepWatch.on_step_end\n"
        "def kill(self, args, state, control, **kwargs):\n"
        "    original(self, args, state, control, **kwargs)\n"
        "    if state.global_step == 5:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "fit._StepWatch.on_step_end = kill\n"
        f"train.run_training({options!r})\n"
    )
    with warm_processes():
        killed = subprocess.run([sys.executable, str(script)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (options.run.output_dir / "adapter").exists()
    resumed = run_training(with_run(options, resume=True))
    assert_same_adapter(Path(whole["adapter_dir"]), Path(resumed["adapter_dir"]))


def test_ctrl_c_keeps_a_checkpoint_to_resume_from(options: TrainOptions, tmp_path: Path) -> None:
    arguments = [
        *("--model", options.model.model, "--data", options.data.data, "--storage", "nf4"),
        *("--device", "cpu", "--compute-dtype", "fp32", "--positions", "f2+l2"),
        *("--epochs", "100000", "--batch-size", "3", "--output-dir", str(tmp_path / "long")),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with warm_processes():
        process = subprocess.Popen(
            [sys.executable, "-m", "lowmem_reft.cli", "train", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "long").glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert "--resume" in errors
    assert "Traceback" not in errors


def test_resume_without_a_checkpoint_is_refused(options: TrainOptions) -> None:
    with pytest.raises(InputError, match="resume must find a checkpoint"):
        run_training(with_run(options, resume=True))


@pytest.fixture
def begun(options: TrainOptions) -> TrainOptions:
    """Options of a run with a checkpoint of its step 2, and one of step 4."""
    options = with_run(replace(options, optim=replace(options.optim, max_steps=4)), save_steps=2)
    run_training(options)
    return with_run(options, resume=True)


def test_a_run_is_not_resumed_under_defaults_that_have_changed_since(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    red = MethodOptions(method="red")
    options = replace(options, method=red, optim=replace(options.optim, max_steps=2))
    saved = run_training(with_run(options, save_steps=1))["adapter_dir"]
    assert json.loads((Path(saved) / "adapter_config.json").read_text())["positions"] == "every"
    begun = options.run.output_dir / "run.json"
    begun.write_text(begun.read_text().replace('"positions": "every"', '"positions": null'))
    with pytest.raises(InputError, match="positions 'every' instead of not given"):
        run_training(with_run(options, resume=True))


def test_other_settings_than_those_of_the_checkpoint_are_refused_and_named(
    begun: TrainOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "lowmem_reft.runs.train.load_frozen", lambda *_, **__: pytest.fail("loaded")
    )
    less = tmp_path / "less.jsonl"
    less.write_text("".join(json.dumps(row) + "\n" for row in ROWS[1:]))
    for message, changes in {
        "rank 16 instead of 8": {"method": replace(begun.method, rank=16)},
        "seed 1 instead of 0": {"run": replace(begun.run, seed=1)},
        "lr 0.1 instead of 0.01": {"optim": replace(begun.optim, lr=0.1)},
        "effective batch 4 instead of 3": {"optim": replace(begun.optim, batch_size=4)},
        "storage 'fp32' instead of 'nf4'": {"model": replace(begun.model, storage="fp32")},
        r"data \(rows \w{12}\) instead of": {"data": DataOptions(data=str(less))},
        r"validation_data \(rows": {"held_out": HeldOutOptions(validation_data=str(less))},
        "max_steps must reach the last checkpoint, which is of step 4, got 3": {
            "optim": replace(begun.optim, max_steps=3)
        },
        r"epochs must reach .* of step 4, got 0.5, which are 2 steps": {
            "optim": replace(begun.optim, max_steps=-1, epochs=0.5)
        },
    }.items():
        with pytest.raises(InputError, match=message):
            run_training(replace(begun, **changes))
    assert (begun.run.output_dir / "checkpoint-4").is_dir()
    assert (begun.run.output_dir / "result.json").is_file()


def test_a_run_goes_on_for_longer_and_with_another_split_of_the_batch(begun: TrainOptions) -> None:
    optim = replace(begun.optim, max_steps=6, batch_size=1, gradient_accumulation=3)
    result = run_training(with_run(replace(begun, optim=optim), logging_steps=2, save_steps=5))
    assert result["num_steps"] == 6


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end where their directory is ready."""

    def begun(*_: object) -> None:
        raise InputError("begun")

    monkeypatch.setattr("lowmem_reft.runs.train._attach", begun)


def test_a_run_that_replaces_an_adapter_says_so(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    options = with_run(replace(options, optim=replace(options.optim, max_steps=1)), quiet=False)
    said = f"the adapter in {options.run.output_dir} is replaced: a run has finished there"
    for is_there in (False, True):
        run_training(options)
        assert (said in capsys.readouterr().err) == is_there


def test_a_finished_run_with_other_settings_is_replaced_on_request_alone(
    options: TrainOptions, no_training: None
) -> None:
    directory = options.run.output_dir
    for name, content in {
        "rank 4 instead of 8": {"method": replace(options.method, rank=4)},
        "num_steps 4 instead of 8": {"optim": replace(options.optim, epochs=1)},
    }.items():
        with pytest.raises(InputError, match="begun"):
            run_training(options)
        (directory / "result.json").write_text("{}")
        with pytest.raises(InputError, match=f"finished run with other settings, .*: {name}; "):
            run_training(replace(options, **content))
        assert (directory / "result.json").is_file()
        with pytest.raises(InputError, match="begun"):
            run_training(with_run(replace(options, **content), overwrite=True))
        assert not (directory / "result.json").exists()


def test_checkpoints_of_an_unfinished_run_are_replaced_on_request(
    options: TrainOptions, no_training: None
) -> None:
    (options.run.output_dir / "checkpoint-7").mkdir(parents=True)
    with pytest.raises(InputError, match="replace them with --overwrite"):
        run_training(options)
    with pytest.raises(InputError, match="begun"):
        run_training(with_run(options, overwrite=True))
    assert not (options.run.output_dir / "checkpoint-7").exists()


def test_a_run_is_not_resumed_and_replaced_at_once(options: TrainOptions) -> None:
    with pytest.raises(InputError, match="overwrite must be left out with resume"):
        with_run(options, resume=True, overwrite=True)


def test_without_a_terminal_losses_are_lines_and_quiet_leaves_them_out(
    options: TrainOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(options, optim=replace(options.optim, max_steps=2))
    run_training(options)
    out, err = capsys.readouterr()
    assert out == ""
    assert "loss" not in err
    run_training(with_run(options, quiet=False))
    out, err = capsys.readouterr()
    assert out == ""
    line = r"^step 2/2 loss \d\S+ lr \d\S+ \S+ steps/s peak \d\S+ GiB$"
    assert re.search(line, err, re.MULTILINE)
    assert "{'" not in err


def test_checkpoints_of_an_unfinished_run_are_not_trained_over(options: TrainOptions) -> None:
    checkpoint = options.run.output_dir / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    with pytest.raises(InputError, match="output_dir must not hold checkpoints of an unfinished"):
        run_training(options)
    (options.run.output_dir / "result.json").write_text("{}")  # it had finished after all
    with pytest.raises(InputError, match="its settings are not known"):
        run_training(options)
    run_training(with_run(options, overwrite=True))
    assert not checkpoint.exists()


def test_a_wrong_evaluation_file_is_refused_before_the_training(options: TrainOptions) -> None:
    held_out = HeldOutOptions(eval_data="nowhere.jsonl")
    with pytest.raises(InputError, match=r"nowhere\.jsonl"):
        run_training(replace(options, held_out=held_out))
    assert not options.run.output_dir.exists()


@pytest.mark.parametrize("name", ["batch_size", "gradient_accumulation"])
def test_counts_below_one_are_refused(options: TrainOptions, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        run_training(replace(options, optim=replace(options.optim, **{name: 0})))


def test_evaluation_rows_are_scored_after_training(options: TrainOptions) -> None:
    held_out = HeldOutOptions(eval_data=options.data.data, eval_limit=4)
    result = run_training(replace(options, held_out=held_out))
    assert result["eval"]["num_examples"] == 4


def test_the_training_card_carries_what_scoring_must_share(options: TrainOptions) -> None:
    data = replace(options.data, template="Q: {prompt}\\nA:")
    result = run_training(replace(options, data=data))
    card = load_card(Path(result["adapter_dir"]))
    assert card is not None
    assert (card.storage, card.template, card.method) == ("nf4", "Q: {prompt}\\nA:", "loreft")
    assert (card.task_type, card.max_length) == ("CAUSAL_LM", 512)


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MethodOptions(positions="x3"), "positions must be"),
        (MethodOptions(layers="1-2"), "layers must be"),
        (MethodOptions(method="lora", layers="1-2"), "layers must be"),
        (MethodOptions(method="red", rank=2), "rank must not be given"),
        (MethodOptions(method="lorefd"), "method must be one of"),
    ],
)
def test_a_wrong_method_is_refused_before_the_base_is_loaded(
    options: TrainOptions, method: MethodOptions, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run_training(replace(options, method=method))


@pytest.mark.usefixtures("no_base")
def test_evaluation_rows_without_labels_are_refused_before_a_classifier_is_loaded(
    options: TrainOptions, tmp_path: Path
) -> None:
    data = tmp_path / "labels.csv"
    data.write_text("text,label\nthe film,good\na fox,bad\n")
    wrong = replace(
        options,
        model=replace(options.model, task_type="SEQ_CLS"),
        data=DataOptions(data=str(data)),
        held_out=HeldOutOptions(eval_data=options.data.data),
    )
    with pytest.raises(InputError, match="a row must have text and label, got a choices row"):
        run_training(wrong)


def test_activation_checkpointing_gives_the_same_adapter_for_less_memory(
    options: TrainOptions, tmp_path: Path
) -> None:
    plain = run_training(options)
    saving = replace(
        with_run(options, output_dir=tmp_path / "saving"),
        memory=MemoryOptions(activation_checkpointing=True),
    )
    saved = run_training(saving)
    assert saved["peak_bytes"] < plain["peak_bytes"]
    assert saved["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-5)


def test_the_trainer_uses_one_gpu_however_many_there_are(
    options: TrainOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    run = resolve(options)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    options = replace(options, model=replace(options.model, device="cuda"))
    arguments = _training_arguments(replace(run, options=options))
    # What the Trainer reads, in its order: the device sets the number, the batch follows from it.
    assert arguments.device.type == "cuda"
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == options.optim.batch_size
    AcceleratorState._reset_state(reset_partial_state=True)


def test_warm_up_may_take_all_steps(options: TrainOptions) -> None:
    optim = replace(options.optim, warmup_ratio=1.0)
    assert _training_arguments(resolve(replace(options, optim=optim))).get_warmup_steps(40) == 40


def test_memory_is_measured_on_the_device_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {torch.device("cuda", 0): 1, torch.device("cuda", 1): 2}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=0: used[device])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device=0: used[device] + 5)
    peak = _cuda_peak(torch.device("cuda", 1))
    assert peak == {"peak_bytes": 2, "reserved_bytes": 7}


def test_a_classification_head_is_trained_saved_and_scored(
    options: TrainOptions, tmp_path: Path
) -> None:
    from lowmem_reft.runs.evaluate import run_evaluation

    data = tmp_path / "labels.csv"
    data.write_text("text,label\n" + "".join(f"{r['prompt']},{r['answer']}\n" for r in ROWS))
    model = replace(options.model, task_type="SEQ_CLS")
    optim = replace(options.optim, epochs=15)
    result = run_training(
        replace(options, model=model, data=DataOptions(data=str(data)), optim=optim)
    )
    assert any("score" in name for name in weights(Path(result["adapter_dir"])))
    scored = run_evaluation(
        EvaluateOptions(
            model=options.model,
            data=DataOptions(data=str(data)),
            adapter=Path(result["adapter_dir"]),
            quiet=True,
        )
    )
    assert scored["accuracy"] == 1.0


def test_find_adapter_accepts_the_run_directory_and_refuses_others(
    options: TrainOptions, tmp_path: Path
) -> None:
    result = run_training(options)
    assert find_adapter(options.run.output_dir) == Path(result["adapter_dir"])
    looked_for = r"adapter must be a directory .* none of .*, \S+/train/adapter/adapter_config.json"
    with pytest.raises(InputError, match=looked_for):
        find_adapter(tmp_path)
    cell = tmp_path / "cell"
    (cell / "train").mkdir(parents=True)
    shutil.move(result["adapter_dir"], cell / "train" / "adapter")
    assert find_adapter(cell) == find_adapter(cell / "train") == cell / "train" / "adapter"


def test_dequantizing_what_is_not_quantized_is_said_to_have_no_effect(
    options: TrainOptions, caplog: pytest.LogCaptureFixture
) -> None:
    options = replace(
        options,
        model=replace(options.model, storage="fp32"),
        method=MethodOptions(layers="upper:0.5", positions="l1"),
    )
    for reuse, said in (("off", "nothing is reused"), ("trunk", "the base has no 4-bit layers")):
        run_training(replace(options, reuse=ReuseOptions(reuse=reuse, dequantize_upper="on")))
        assert f"dequantize_upper has no effect: {said}" in caplog.text


@pytest.mark.parametrize("asked", ["auto", "off"])
def test_a_run_says_that_it_keeps_upper_blocks_dequantized(
    options: TrainOptions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: Any,
) -> None:
    monkeypatch.setattr(Reuse, "may_stay_dequantized", lambda *_: True)
    run_training(
        replace(
            with_run(options, quiet=False),
            model=replace(options.model, storage="nf4"),
            method=MethodOptions(layers="upper:0.5", positions="l1"),
            reuse=ReuseOptions(reuse="prefix", dequantize_upper=asked),
        )
    )
    assert ("upper blocks stay dequantized: " in capsys.readouterr().err) == (asked == "auto")


def test_a_run_that_reuses_what_is_constant_ends_in_the_same_adapter(
    options: TrainOptions, tmp_path: Path
) -> None:
    method = MethodOptions(method="loreft", rank=2, layers="1", positions="l1")
    results = {}
    for mode in ("off", "prefix"):
        run = replace(options.run, output_dir=tmp_path / mode)
        results[mode] = run_training(
            replace(options, method=method, run=run, reuse=ReuseOptions(reuse=mode))
        )
    assert [results[mode]["reuse"] for mode in results] == ["off", "prefix"]
    assert results["prefix"]["store_bytes"] > 0
    assert results["prefix"]["build_time_s"] > 0
    assert results["prefix"]["train_loss"] == pytest.approx(results["off"]["train_loss"], rel=1e-5)
    plain, reused = (weights(Path(results[mode]["adapter_dir"])) for mode in ("off", "prefix"))
    for name, values in plain.items():
        torch.testing.assert_close(reused[name], values, rtol=1e-4, atol=1e-5)


def test_a_regression_head_is_trained_saved_and_scored_by_correlation(
    options: TrainOptions, tmp_path: Path
) -> None:
    from lowmem_reft.runs.evaluate import run_evaluation

    data = tmp_path / "targets.jsonl"
    rows = [
        {"text": row["prompt"], "text_pair": "a fox", "target": 5.0 * row["answer"]} for row in ROWS
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scoring = ScoringOptions(metric="pearson")
    result = run_training(
        replace(
            options,
            model=replace(options.model, task_type="SEQ_CLS"),
            data=DataOptions(data=str(data)),
            optim=replace(options.optim, epochs=20),
        )
    )
    scored = run_evaluation(
        EvaluateOptions(
            model=ModelOptions(model=options.model.model, compute_dtype="fp32", device="cpu"),
            data=DataOptions(data=str(data)),
            adapter=Path(result["adapter_dir"]),
            scoring=scoring,
            predictions=tmp_path / "predictions.jsonl",
            quiet=True,
        )
    )
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    pairs = torch.tensor([[line["prediction"], line["reference"]] for line in lines])
    assert (scored["metric"], scored["num_examples"]) == ("pearson", 12)
    assert scored["value"] == pytest.approx(torch.corrcoef(pairs.T)[0, 1].item(), abs=1e-5)
    assert scored["value"] > 0.8
    with pytest.raises(InputError, match="a row must have text and target"):
        run_evaluation(
            EvaluateOptions(
                model=ModelOptions(model=options.model.model, compute_dtype="fp32", device="cpu"),
                data=options.data,
                adapter=Path(result["adapter_dir"]),
                quiet=True,
            )
        )
