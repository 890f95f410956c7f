"""Several processes train one adapter: launched as users launch them, on the CPU through gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import compare_versions
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import own_script
from lowmem_reft import ReftConfig, cli, load_base
from lowmem_reft.errors import InputError
from lowmem_reft.machine import processes
from lowmem_reft.machine.devices import resolve_device
from lowmem_reft.options import (
    DataOptions,
    HeldOutOptions,
    MemoryOptions,
    MethodOptions,
    ModelOptions,
    OptimOptions,
    ReuseOptions,
    RunOptions,
    TrainOptions,
)
from lowmem_reft.reft.layer import ReftLayer
from lowmem_reft.reft.positions import assign_groups, num_groups, parse_positions
from lowmem_reft.runs.fit import _edits_in_every_batch
from lowmem_reft.runs.train import run_training
from warm import warm_processes

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "accelerate"
WORDS = ["cat", "dog", "fox", "film", "time", "fou", "quick", "lazy"]
ROWS = [
    {"prompt": f"is the {word} good?" + " so" * (i % 3), "choices": ["yes", "no"], "answer": i % 2}
    for i, word in enumerate(2 * WORDS)
]


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> TrainOptions:
    """One process: eight examples a step, as two processes with half the accumulation have."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return TrainOptions(
        model=ModelOptions(
            model=str(tiny_llama_dir), storage="nf4", compute_dtype="fp32", device="cpu"
        ),
        data=DataOptions(data=str(data)),
        method=MethodOptions(positions="f2+l2", layers="2;3"),
        optim=OptimOptions(epochs=3, batch_size=2, gradient_accumulation=4, lr=1e-2),
        reuse=ReuseOptions(reuse="trunk"),
        run=RunOptions(output_dir=tmp_path / "one", quiet=True, logging_steps=1),
    )


def flags(options: TrainOptions, output_dir: Path) -> list[str]:
    """The command line of ``options`` for two processes."""
    return (
        f"train --model {options.model.model} --storage nf4 --compute-dtype fp32 --device cpu "
        f"--data {options.data.data} --positions f2+l2 --layers 2;3 --epochs 3 --batch-size 2 "
        f"--gradient-accumulation 2 --lr 1e-2 --reuse trunk --logging-steps 1 "
        f"--output-dir {output_dir}"
    ).split()


def launch(config: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start two processes of ``command`` as ``accelerate launch`` does, and wait for them."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    with warm_processes():
        return subprocess.run(
            [*launcher, "--num_processes", "2", "--config_file", str(CONFIGS / config), *command],
            capture_output=True,
            text=True,
            timeout=240,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            check=False,
        )


def difference(one: Path, two: Path) -> float:
    """The largest difference between the weights of two adapters."""
    first, second = (load_file(path / "adapter_model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    assert all(value.dtype == torch.float32 for value in second.values())
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_two_processes_train_the_adapter_of_one_with_twice_the_accumulation(
    options: TrainOptions, tmp_path: Path
) -> None:
    rows = options.data.data
    held_out = HeldOutOptions(validation_data=rows, eval_data=rows)
    run = replace(options.run, logging_steps=4)  # two steps come after the last report
    one = run_training(replace(options, held_out=held_out, run=run))
    more = ["--validation-data", rows, "--eval-data", rows, "--logging-steps", "4", "--json"]
    out = tmp_path / "two"
    script = str(ROOT / "tests" / "support" / "launched.py")
    done = launch("cards.yaml", script, *flags(options, out), *more, RECORD_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()  # one process speaks
    two = json.loads(line)
    assert difference(Path(one["adapter_dir"]), out / "adapter") < 1e-6
    assert [loss for _, loss in two["loss_history"]] == pytest.approx(
        [loss for _, loss in one["loss_history"]], abs=1e-5
    )
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
    assert (two["num_processes"], two["effective_batch"]) == (2, one["effective_batch"])
    assert "2 examples x 2 accumulation x 2 processes = 8" in done.stderr
    assert done.stderr.count("reuse: trunk") == 1
    assert "find_unused_parameters" not in done.stderr
    assert two["best_epoch"] == one["best_epoch"]
    assert two["eval"]["loss"] == pytest.approx(one["eval"]["loss"], abs=1e-5)
    assert json.loads((out / "result.json").read_text())["eval"] == two["eval"]
    assert sorted(path.name for path in tmp_path.glob("writes-*")) == ["writes-0"]  # built once
    assert len(list((out / "reuse").glob("trunk-*"))) == 1


@pytest.mark.skipif(
    compare_versions("accelerate", "<", "1.15"), reason="loses the optimizer's state under FSDP"
)
def test_a_killed_process_ends_a_sharded_run_in_words_and_resume_trains_the_same_adapter(
    options: TrainOptions, tmp_path: Path
) -> None:
    one = run_training(options)
    out = tmp_path / "two"
    killed = launch(
        "fsdp2.yaml",
        str(ROOT / "tests" / "support" / "launched.py"),
        *flags(options, out),
        *("--save-steps", "2"),
        RECORD_DIR=str(tmp_path),
        DIE_AT="3",
    )
    assert killed.returncode != 0
    said = [line for line in killed.stderr.splitlines() if line.startswith("lowmem-reft train")]
    assert len(said) == 2, killed.stderr
    assert "another process of this run has ended" in said[0] or "interrupted" in said[0]
    assert "add --resume" in said[1]
    assert not (out / "result.json").exists()
    (checkpoint,) = out.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    resumed = launch("fsdp2.yaml", "-m", "lowmem_reft.cli", *flags(options, out), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert difference(Path(one["adapter_dir"]), out / "adapter") < 1e-6
    assert json.loads((out / "result.json").read_text())["num_steps"] == one["num_steps"] == 6


@pytest.mark.parametrize("config", ["cards.yaml", "fsdp2.yaml"])
def test_an_own_script_trains_the_same_adapter_from_the_same_batches_and_positions(
    tiny_llama_dir: Path, tmp_path: Path, config: str
) -> None:
    own_script.main(str(tiny_llama_dir), str(tmp_path / "one"), 4)
    script = str(ROOT / "tests" / "support" / "own_script.py")
    done = launch(config, script, str(tiny_llama_dir), str(tmp_path / "two"), "2")
    assert done.returncode == 0, done.stderr
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6
    alone = json.loads((tmp_path / "one" / "seen-0.json").read_text())["seen"]
    noted = [json.loads((tmp_path / "two" / f"seen-{i}.json").read_text()) for i in range(2)]
    assert {part["share"] for part in noted} == {0.5 if config == "fsdp2.yaml" else 1.0}
    shares = [part["seen"] for part in noted]
    # Batches of two examples go to the processes in turn.
    together = [
        example for i in range(0, 24, 2) for share in shares for example in share[i : i + 2]
    ]
    assert together == alone[: len(together)]
    assert len({number for number, _ in alone}) == 24


@pytest.mark.parametrize("name", ["one", "cards", "fsdp2", "nodes"])
def test_a_configuration_is_one_that_accelerate_reads_and_says_how_to_launch(name: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    config: Any = load_config_from_file(str(path))
    assert config.mixed_precision == "no"
    assert (config.num_processes > 1) == (name != "one")
    assert (config.num_machines > 1) == (name == "nodes")
    assert f"accelerate launch --config_file recipes/accelerate/{name}.yaml" in path.read_text()


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
def test_each_process_takes_the_card_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == torch.device("cuda", 1)
    with pytest.raises(InputError, match="device must be auto, cpu or cuda with 2 processes"):
        processes.start("cuda:0")


def test_processes_that_accelerate_was_asked_for_and_did_not_start_are_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As ``accelerate launch --cpu --num_processes 2`` does; accelerate's own words for it."""
    words = ["--cpu", "--num_processes", "2", "-m", "lowmem_reft.cli", "train"]
    asked, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    _, environment = prepare_simple_launcher_cmd_env(asked)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"accelerate launch has started one process.*torchrun"):
        processes.start("cpu")


@pytest.mark.usefixtures("second_of_two")
def test_only_train_runs_in_several_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_LAUNCHER_ENDS_ALL_S", 0.0)
    assert cli.main(["methods"]) == 2
    assert "process 1: error: num_processes must be 1 for methods" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "fsdp_version must be 2 here"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "efficient_loading must be false"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "mixed_precision must be no here"),
        ({}, {"reuse": ReuseOptions(resident="upper")}, "resident must be left out with FSDP"),
        ({}, {"memory": MemoryOptions(embedding_on_host=True)}, "embedding_on_host must be left"),
    ],
)
def test_what_a_sharded_base_cannot_be_trained_with_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    options: TrainOptions,
    environment: dict[str, str],
    changes: dict[str, Any],
    message: str,
) -> None:
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **environment}
    for name, value in sharded.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        run_training(replace(options, **changes))


def test_a_sharded_run_is_not_resumed_by_an_accelerate_that_loses_the_optimizer(
    monkeypatch: pytest.MonkeyPatch, options: TrainOptions
) -> None:
    monkeypatch.setattr("accelerate.utils.compare_versions", lambda *_: True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=r"before accelerate 1\.15"):
        run_training(replace(options, run=replace(options.run, resume=True)))


def test_a_base_in_8_bits_is_not_sharded(
    monkeypatch: pytest.MonkeyPatch, options: TrainOptions
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match="storage must be nf4, fp4, bf16 or fp32 with FSDP"):
        run_training(replace(options, model=replace(options.model, storage="int8")))


@pytest.mark.parametrize(("is_sharded", "gradient"), [("true", 0.0), ("false", None)])
def test_a_part_that_edits_nothing_has_a_gradient_only_where_processes_must_reduce_the_same(
    monkeypatch: pytest.MonkeyPatch, is_sharded: str, gradient: float | None
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", is_sharded)
    layer, hidden, nothing = edited_layer()
    out = layer._edit(hidden, layer.reft_phi["default"][0], (nothing, nothing), 0.0)
    assert torch.equal(out, hidden)
    (out.sum() + 0 * hidden.sum()).backward()
    grad = layer.reft_phi["default"][0].source.weight.grad
    assert (grad if grad is None else float(grad.abs().max())) == gradient


@pytest.mark.parametrize(
    ("positions", "tie", "num_prompt_tokens", "is_sure"),
    [
        ("f7+l7", "sides", 2, True),
        ("f7+l1", "sides", 2, True),
        ("f1+l7", "sides", 1, False),
        ("l7", "sides", 1, True),
        ("f2+l2", "tied", 1, True),
        ("l3", "positions", 3, True),
        ("l3", "positions", 2, False),
        ("f2+l2", "positions", 3, False),
        ("all", "tied", 1, True),
        ("every", "sides", 1, True),
        ("f1+l7+response", "sides", 2, True),
        ("f1+l7+response", "sides", 1, False),
        ("response", "positions", 1, True),
    ],
)
def test_processes_need_not_look_for_unused_parameters_if_every_prompt_is_long_enough(
    positions: str, tie: str, num_prompt_tokens: int, is_sure: bool
) -> None:
    config = ReftConfig(positions=positions, tie=tie, task_type="CAUSAL_LM")
    labels = [-100] * num_prompt_tokens + [5]
    examples = [
        {"input_ids": [5] * 9, "labels": [-100] * 8 + [5]},
        {"input_ids": [5] * len(labels), "labels": labels},
    ]
    assert _edits_in_every_batch(config, examples) == is_sure
    # What the rule rests on: the shortest example alone has a token for each intervention or not.
    attended = torch.ones(1, num_prompt_tokens + 1, dtype=torch.bool)
    prompt = torch.arange(num_prompt_tokens + 1)[None] < num_prompt_tokens
    groups = assign_groups(parse_positions(positions), tie, prompt, attended=attended)
    wanted = num_groups(parse_positions(positions), tie)
    assert ({*groups[0].tolist()} >= {*range(wanted)}) == is_sure


def test_processes_look_for_unused_parameters_of_methods_that_may_have_some() -> None:
    examples = [{"input_ids": [5] * 9, "labels": 1}]
    assert not _edits_in_every_batch(LoraConfig(), examples)
    assert _edits_in_every_batch(ReftConfig(positions="f2+l2", task_type="SEQ_CLS"), examples)


def test_mixed_precision_is_refused_where_it_would_cast_what_is_gathered(
    monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path
) -> None:
    model: Any = get_peft_model(
        load_base(tiny_llama_dir, storage="fp32", device="cpu"),
        ReftConfig(rank=2, task_type="FEATURE_EXTRACTION"),
    )
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"_mixed_precision": "bf16"})
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    model(**batch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="mixed_precision must be no with FSDP, got 'bf16'"):
        model(**batch)


def edited_layer() -> tuple[ReftLayer, torch.Tensor, torch.Tensor]:
    """A layer of one intervention in training mode, hidden vectors, and an index of none."""
    layer = ReftLayer(8, current=None)  # type: ignore[arg-type]
    layer.add("default", ReftConfig(rank=2, task_type="CAUSAL_LM"), torch.device("cpu"))
    return layer.train(), torch.randn(1, 3, 8, requires_grad=True), torch.empty(0, dtype=torch.long)
