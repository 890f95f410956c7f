"""The benchmarks run, say what they measured, and report a failing method as a row."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import Worker, alternate, ratio, summarize
from benchmarks.step import check_comparable

ROOT = Path(__file__).resolve().parent.parent


def run_benchmark(name: str, *arguments: str) -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "LOWMEM_REFT_PYREFT_PYTHON"}
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
