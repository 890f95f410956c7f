"""What is measured on a GPU is rehearsed on the CPU; a part that fails or hangs stops no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, memory, parity
from benchmarks.gpu import GpuBenchmark, Part, chosen, is_wrong, run_parts
from lowmem_reft.base import checkpointing, techniques
from lowmem_reft.errors import InputError
from warm import warm_processes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--minutes", "30"]
    command += ["--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with warm_processes():
        finished = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2000
        )
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout)  # nothing but the JSON line
    assert json.loads(output.read_text()) == result
    return result


def rows_of(rehearsed: dict[str, Any], part: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = rehearsed["parts"][part]["figures"]["rows"]
    assert [row for row in rows if "error" in row] == []
    return rows


def test_the_rehearsal_runs_every_part_and_says_on_what(rehearsed: dict[str, Any]) -> None:
    assert {name: part["status"] for name, part in rehearsed["parts"].items()} == dict.fromkeys(
        gpu.PARTS, "ok"
    )
    assert {"versions", "device", "commit", "command", "date"} <= rehearsed["environment"].keys()
    for part in rehearsed["parts"].values():
        assert part["seconds"] > 0
        assert part["command"].startswith("python -m benchmarks.")
        assert "--device cpu --small" in part["command"]


def test_the_rehearsal_compares_every_kind_of_base_and_way_to_save_memory(
    rehearsed: dict[str, Any],
) -> None:
    rows = {row["method"]: row for row in rows_of(rehearsed, "parity")}
    assert all(row["ok"] for row in rows.values())
    for storage, dtype, _ in parity.KINDS:
        for technique in parity.TECHNIQUES:
            errors = rows.pop(f"{storage}, {dtype}, {technique}")["errors"]
            assert errors.keys() == {"logits", "loss", "gradient"}
    assert list(rows) == [
        *("reuse, resident all", "reuse, resident upper"),
        *("generation, rows: 3", "generation, rows: 1"),
        *("nf4, quantized there", "int8, quantized there"),
        "training",
    ]


def test_the_rehearsal_measures_memory_and_time_beside_predictions(
    rehearsed: dict[str, Any],
) -> None:
    of_memory = rows_of(rehearsed, "memory")
    assert [(row["method"], row["tokens"]) for row in of_memory] == [
        (method, 2048 // 64) for method in memory.REAL
    ]
    assert len(of_memory) == 12
    steps = rows_of(rehearsed, "step")
    assert [row["tokens"] for row in steps] == [512 // 64, 8192 // 64] * 4
    assert "PEFT QLoRA r16" in {row["method"] for row in steps}
    for row in (*of_memory, *steps):
        assert row["predicted_bytes"] >= row["measured_bytes"] > 0
        assert row["tokens_per_s"] > 0


def test_the_rehearsal_trains_from_stores_with_upper_blocks_alone(
    rehearsed: dict[str, Any],
) -> None:
    rows = rows_of(rehearsed, "reuse")
    (of_70b,) = rows_of(rehearsed, "70b")
    assert (of_70b["resident"], of_70b["limit_gib"]) == ("upper", 24)
    reused = [row for row in (*rows, of_70b) if "reused" in row["method"]]
    assert [row["resident"] for row in reused] == ["upper", "all", "all", "upper"]
    for row in reused:
        assert row["max_grad_rel_error"] <= 5e-2
        assert row["build_time_s"] > 0
        assert row["store_bytes"] > 0
        assert row["predicted_bytes"] >= row["peak_bytes"] > 0
    methods = {"PEFT QLoRA r16", "PEFT QLoRA r16, checkpointing", "QLoRA r16, our loss"}
    gains = rehearsed["parts"]["reuse"]["figures"]["gains"]
    assert [gain.keys() for gain in gains.values()] == [methods | {"LoReFT, plain"}] * 2
    assert rows_of(rehearsed, "decode")[0]["method"] == "bare base"


def wrong_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def enable(model: Any, *_: Any, **__: Any) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: 1.001 * gradient)

    monkeypatch.setattr(techniques, "enable_activation_checkpointing", enable)


def wrong_bytes_from_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpointing, "_to_host", torch.zeros_like)


def no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    nan = {"gradient": float("nan")}
    monkeypatch.setattr(parity, "step_errors", lambda *_: nan)


def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_errors(*_: Any) -> dict[str, float]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(parity, "step_errors", step_errors)


@pytest.mark.parametrize(
    ("break_it", "row"),
    [
        (wrong_gradients, "nf4, fp32, checkpointing"),
        (wrong_bytes_from_host, "nf4, fp32, offloaded"),
        (wrong_bytes_from_host, "nf4, bf16, offloaded"),
        (no_number, "nf4, fp32, plain"),
        (no_kernel, "nf4, fp32, plain"),
    ],
)
def test_parity_fails_where_the_device_computes_something_else(
    break_it: Callable[[pytest.MonkeyPatch], None],
    row: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    break_it(monkeypatch)
    output = tmp_path / "parity.json"
    options = parity.ParityBenchmark(device="cpu", only=row, json=True, output=output)
    assert parity.main(options) == 1
    (found,) = json.loads(output.read_text())["rows"]
    assert not found.get("ok", False)


BEGIN = """
import json, pathlib, sys
HERE = pathlib.Path(__file__).parent
output = sys.argv[-1]
"""
SCRIPTS = {
    "sound": "json.dump({'rows': []}, open(output, 'w'))",
    "raising": "raise RuntimeError('no such kernel')",
    "hanging": (
        "json.dump({'rows': [{}]}, open(output, 'w'))\n"
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        "open(HERE / 'pid', 'w').write(str(child.pid))\n"
        "time.sleep(1000)"
    ),
}


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    begin = (
        "import json, pathlib, sys\nHERE = pathlib.Path(__file__).parent\noutput = sys.argv[-1]\n"
    )
    for name, script in SCRIPTS.items():
        (tmp_path / f"{name}_part.py").write_text(begin + script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    limits = {"raising": 60.0, "hanging": 5.0, "sound": 60.0}
    return {
        name: Part(module=f"{name}_part", limit_s=limit, is_correctness=name == "sound")
        for name, limit in limits.items()
    }


def test_a_part_that_raises_or_hangs_is_said_and_the_others_go_on(
    parts: dict[str, Part], tmp_path: Path
) -> None:
    output = tmp_path / "gpu.json"
    result = run_parts(parts, GpuBenchmark(output=output), {})
    assert json.loads(output.read_text())["parts"] == result["parts"]
    raising, hanging, sound = result["parts"].values()
    assert (raising["status"], raising["figures"]) == ("failed", None)
    assert raising["stderr"][-1] == "RuntimeError: no such kernel"
    assert (hanging["status"], hanging["figures"]) == ("timed out", {"rows": [{}]})
    assert (sound["status"], sound["figures"]) == ("ok", {"rows": []})
    assert not is_wrong(parts, result)


def test_what_a_part_has_started_ends_with_it(parts: dict[str, Part], tmp_path: Path) -> None:
    run_parts({"hanging": parts["hanging"]}, GpuBenchmark(), {})
    status = Path(f"/proc/{(tmp_path / 'pid').read_text()}/status")
    for _ in range(100):  # whoever adopted it has to notice
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("what the part has started still runs")


def test_a_part_without_time_is_skipped_and_a_last_one_has_what_is_left(
    parts: dict[str, Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 2)
    result = run_parts(parts, GpuBenchmark(minutes=0), {})
    assert {part["status"] for part in result["parts"].values()} == {"skipped"}
    hanging = {name: Part(module="hanging_part", limit_s=60) for name in ("first", "second")}
    result = run_parts(hanging, GpuBenchmark(minutes=4 / 60), {})
    first, second = result["parts"].values()
    assert (first["status"], second["status"]) == ("timed out", "skipped")
    assert first["seconds"] < 30


def test_it_is_wrong_if_a_part_of_parity_fails_or_does_not_end(parts: dict[str, Part]) -> None:
    def result(status: str) -> dict[str, Any]:
        statuses = dict.fromkeys(parts, "failed") | {"sound": status}
        return {"parts": {name: {"status": each} for name, each in statuses.items()}}

    wrong = {s: is_wrong(parts, result(s)) for s in ("ok", "skipped", "failed", "timed out")}
    assert wrong == {"ok": False, "skipped": False, "failed": True, "timed out": True}
    assert [name for name, part in gpu.PARTS.items() if part.is_correctness] == ["parity"]


def test_an_unknown_part_is_refused() -> None:
    assert list(chosen(["step", "parity"])) == ["parity", "step"]
    with pytest.raises(InputError, match=r"parts must be of parity, memory, .*, got 'speed'"):
        chosen(["parity", "speed"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_it_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(GpuBenchmark()) == 2
    assert parity.main(parity.ParityBenchmark()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    for name, line in zip(("gpu", "parity"), err.splitlines(), strict=True):
        assert line.startswith(f"benchmarks.{name}: device must be one that torch can use")
