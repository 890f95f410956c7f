"""The benchmarks run, say what they measured, and report a failing method as a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import memory, reuse, reuse_at_size, reuse_steps
from benchmarks.common import (
    Worker,
    alternate,
    failed,
    measured_or_error,
    ratio,
    summarize,
)
from benchmarks.reuse_at_size import RandomCheckpoint, upper_base
from benchmarks.reuse_rounds import SHAPES, config_of
from benchmarks.reuse_steps import AtSize, ReuseBenchmark
from benchmarks.step import check_comparable
from benchmarks.tables import timings
from lowmem_reft.base.blocks import find_blocks
from lowmem_reft.base.identity import base_digest
from warm import warm_processes

ROOT = Path(__file__).resolve().parent.parent


def run_benchmark(name: str, *arguments: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "LOWMEM_REFT_PYREFT_PYTHON"}
    with warm_processes():
        finished = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", "--small", "--json", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    result: dict[str, Any] = json.loads(finished.stdout)  # nothing but the JSON line
    return result


def test_step_benchmark_measures_every_method_on_the_same_base(tmp_path: Path) -> None:
    output = tmp_path / "step.json"
    result = run_benchmark("step", "--repeats", "2", "--threads", "1", "--output", str(output))
    assert json.loads(output.read_text()) == result
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [
        "QLoRA r16, NF4",
        "LoReFT r4, NF4",
        "QLoRA r16, NF4, our head",
        "LoReFT r4, NF4, our head",
        "LoRA r16, fp32",
        "LoReFT r4, fp32",
        "LoReFT r4, fp32, our head",
    ]
    for row in rows.values():
        assert len(row["samples_s"]) == 2
        assert row["min_s"] <= row["median_s"] <= row["max_s"]
        assert row["num_threads"] == 1
    layers, hidden, rank = 2, 64, 4
    for storage in ("NF4", "fp32"):
        loreft = rows[f"LoReFT r4, {storage}"]
        assert loreft["num_trainable_params"] == layers * (2 * rank * hidden + rank)
    assert [entry["theirs"] for entry in result["ratios"] if entry] == [
        "QLoRA r16, NF4",
        "LoRA r16, fp32",
        "QLoRA r16, NF4, our head",
    ]
    assert {"versions", "device", "commit", "command", "date"} <= result["environment"].keys()


def test_orthonormal_benchmark_names_the_stand_in_for_pyreft() -> None:
    result = run_benchmark("orthonormal", "--repeats", "2")
    assert [row["method"] for row in result["rows"]] == ["ours 256x4", "torch, as pyreft 256x4"]
    assert all(row["orthonormality_error"] < 1e-5 for row in result["rows"])
    assert result["ratios"][0]["goal"] == 0.1


def test_generate_benchmark_measures_adapters_beside_the_bare_base(tmp_path: Path) -> None:
    output = tmp_path / "generate.json"
    result = run_benchmark("generate", "--repeats", "2", "--output", str(output))
    assert json.loads(output.read_text()) == result
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == [
        "bare base",
        "LoReFT r4, l1",
        "LoReFT r4, f7+l7",
        "LoReFT r4, all",
        "LoReFT r4, every",
        "LoReFT r4, f7+l7, an adapter per row",
        "LoRA r16, not merged",
        "LoRA r16, not merged, an adapter per row",
    ]
    assert rows.pop("bare base")["max_logit_change"] is None
    for row in rows.values():
        assert len(row["samples_s"]) == 2
        assert row["max_logit_change"] > 0
        assert row["tokens_per_s"] > 0
    assert [(entry["theirs"], round(entry["goal"], 2)) for entry in result["ratios"]] == [
        *[("bare base", 1.02)] * 3,
        ("bare base", 1.03),
        ("LoReFT r4, f7+l7", 1.11),
        ("bare base", 1.02),
        ("LoRA r16, not merged", 1.11),
    ]
    assert "| bare base |" in timings(result)


def test_failing_method_is_a_row_and_the_others_go_on() -> None:
    spec = {"kind": "orthonormal", "hidden": 16, "rank": 2, "method": "torch"}
    broken = Worker(label="broken", module="benchmarks.worker", spec=spec | {"rank": "two"})
    sound = Worker(label="sound", module="benchmarks.worker", spec=spec)
    failed, measured = alternate([broken, sound], num_warmup=0, num_repeats=1)
    assert "broken ended with exit code 1" in failed["error"]
    assert measured["median_s"] > 0
    assert ratio([failed, measured], "sound", "broken", 1.0) is None


def test_ratio_is_the_median_of_the_rounds() -> None:
    ours = {"method": "ours", **summarize([1.0, 2.0, 30.0])}
    theirs = {"method": "theirs", **summarize([2.0, 4.0, 10.0])}
    entry = ratio([ours, theirs], "ours", "theirs", 1.0)
    assert entry is not None
    assert (entry["ratio"], entry["min_ratio"], entry["max_ratio"]) == (0.5, 0.5, 3.0)
    assert entry["met"]


def test_methods_on_different_bases_are_not_compared() -> None:
    rows = [{"method": "a", "base_loss": 6.0}, {"method": "b", "base_loss": 6.1}]
    with pytest.raises(RuntimeError, match="same base"):
        check_comparable(rows)


def test_method_without_effect_is_not_compared() -> None:
    with pytest.raises(RuntimeError, match="no effect"):
        check_comparable([{"method": "a", "base_loss": 6.0, "loss": 6.0}])


def test_reuse_benchmark_reports_every_ratio_the_peaks_and_the_curves(tmp_path: Path) -> None:
    output = tmp_path / "reuse.json"
    result = run_benchmark(
        "reuse", "--curves", "--repeats", "1", "--curve-repeats", "1", "--output", str(output)
    )
    assert json.loads(output.read_text()) == result
    assert output.with_suffix(".png").stat().st_size > 0
    ratios = result["ratios"]
    assert {
        "reuse_vs_qlora",
        "reuse_vs_qlora_checkpointing",
        "reuse_vs_plain_loreft",
        "six_epochs_vs_qlora",
        "upper_all_vs_qlora_checkpointing",
        "long_prompt_vs_qlora",
    } <= ratios.keys()
    assert min(ratios.values()) > 0
    assert ratios["max_grad_rel_error"] == result["max_grad_rel_error"] <= 1e-4
    assert ratios["upper_resident_share"] == result["peak"]["upper_resident_share"] < 1
    for item in result["results"]:
        for row in item["rows"].values():
            assert row["share_of_limit"] == pytest.approx(row["speed_up"] / row["limit"])
        assert item["rows"]["LoReFT, reused"]["limit"] == 1
    assert {name: len(points) for name, points in result["curves"].items()} == {
        "prompt": 4,
        "layer": 4,
        "micro_batch": 4,
        "epochs": 9,
    }


def test_the_limit_counts_blocks_and_the_head_on_the_tokens_they_run_on() -> None:
    config = config_of(small=False)
    gains = [reuse_steps.gain(config, shape, reuse_steps.QLORA, 1.0) for shape in SHAPES]
    assert [each["arithmetic_ratio"] for each in gains] == pytest.approx(
        [9.0, 2.29, 84.0], rel=0.01
    )
    assert [each["limit"] for each in gains] == pytest.approx([7.55, 2.45, 50.8], rel=0.01)
    again = reuse_steps.gain(config, SHAPES[0], reuse_steps.QLORA_CHECKPOINTED, 1.0)
    assert again["arithmetic_ratio"] == pytest.approx(1.5 * gains[0]["arithmetic_ratio"])


def test_a_fast_method_goes_on_for_its_whole_turn_and_a_slow_one_takes_a_step() -> None:
    taken: list[tuple[str, int]] = []

    def step(name: str, number: int) -> float:
        taken.append((name, number))
        return 2.0 if name == "slow" else 0.25 * len(taken)

    seconds = reuse_steps.take_turns(
        {name: lambda number, name=name: step(name, number) for name in ("slow", "fast")},
        rounds=1,
        turn_s=1.0,
    )
    warm_up = [("fast", 0), ("fast", 1), ("fast", 2), ("slow", 0)]
    assert taken == [*warm_up, ("slow", 1), ("fast", 1)]
    assert seconds == {"slow": [2.0], "fast": [1.5]}


def test_a_row_that_starts_too_late_or_has_no_memory_says_so() -> None:
    def without_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 40 GiB.")

    now = time.perf_counter()
    row = measured_or_error(without_memory, started=now, seconds=100)
    assert row == {"error": "out of memory: CUDA out of memory."}
    late = measured_or_error(without_memory, started=now - 1000, seconds=100)
    assert late == {"error": "left out after 100 s"}
    assert not failed([row, late])


def test_a_row_that_goes_wrong_says_how_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(_config: Any, setting: Any, *_: Any, **__: Any) -> dict[str, Any]:
        if setting.storage == "int8":
            raise RuntimeError("no kernel image is available\nfor this device")
        return {"measured": True}

    monkeypatch.setattr(memory, "measured_step", measured)
    monkeypatch.setattr(memory, "said", str)
    output = tmp_path / "memory.json"
    options = memory.MemoryBenchmark(model="llama-3.1-8b", small=True, tokens="64", output=output)
    assert memory.main(options) == 1
    rows = {row["method"]: row for row in json.loads(output.read_text())["rows"]}
    wrong = rows.pop("LoReFT, int8 base")
    assert wrong["error"] == "RuntimeError: no kernel image is available"
    assert wrong["traceback"][-1] == "for this device"
    assert len(rows) == 11
    assert all(row["measured"] for row in rows.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_card_that_is_not_there_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert memory.main(memory.MemoryBenchmark(device="cuda")) == 2
    assert reuse.main(ReuseBenchmark(device="cuda")) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for name, line in zip(("memory", "reuse"), err.splitlines(), strict=True):
        refused = f"benchmarks.{name}: device must be one that torch can use, got 'cuda'"
        assert line.startswith(refused)


def test_reuse_benchmark_measures_every_row_of_a_70b_shape_on_a_tiny_base(tmp_path: Path) -> None:
    output = tmp_path / "reuse-tiny.json"
    arguments = ("--shape", "llama-3.3-70b", "--repeats", "1", "--output", str(output))
    result = run_benchmark("reuse", *arguments)
    assert json.loads(output.read_text()) == result
    for row in result["rows"]:
        assert "error" not in row, row
    for gains in result["gains"].values():
        assert gains.keys() == {"PEFT QLoRA r16, checkpointing"}
    limited = [row for row in result["rows"] if row["limit_gib"] is not None]
    assert len(limited) == 2
    assert all(row["predicted_bytes"] > 0 for row in limited)


def test_gpu_rows_without_memory_or_time_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(*_: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 40 GiB.")

    monkeypatch.setattr(reuse_at_size, "measured", measured)
    options = ReuseBenchmark(at_size=AtSize(shape="llama-3.3-70b"), small=True)
    started = reuse_at_size.time.perf_counter()
    rows = reuse_at_size.measure_rows(options, torch.device("cpu"), tmp_path, started)
    assert {row["error"] for row in rows} == {"out of memory: CUDA out of memory."}
    assert reuse_at_size.gains_of(options, rows) == {}
    late = reuse_at_size.measure_rows(options, torch.device("cpu"), tmp_path, started - 1000)
    assert {row["error"] for row in late} == {"left out after 480 s"}


def test_blocks_of_a_random_checkpoint_are_drawn_alike_every_time() -> None:
    config = reuse_at_size.config_of(ReuseBenchmark(small=True))
    checkpoint = RandomCheckpoint(config, torch.device("cpu"))
    first, again, other = (checkpoint.block(index) for index in (1, 1, 2))
    assert base_digest(first) == base_digest(again) != base_digest(other)
    assert torch.equal(checkpoint.embedding().weight, checkpoint.embedding().weight)


def test_only_upper_blocks_of_a_random_upper_base_are_there() -> None:
    base = upper_base(reuse_at_size.config_of(ReuseBenchmark(small=True)), 3, torch.device("cpu"))
    blocks = find_blocks(base)[1]
    lower = {id(part) for block in blocks[:3] for part in block.modules()}
    lower.add(id(base.get_input_embeddings()))
    for module in base.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            assert tensor is None or tensor.is_meta == (id(module) in lower)
    ids = torch.randint(3, 256, (2, 9))
    with torch.no_grad(), base.residency.streaming():
        assert torch.isfinite(base(input_ids=ids).logits).all()
