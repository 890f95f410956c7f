"""train --dry-run: what would be trained, and whether it fits; nothing is loaded or written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.options import TrainOptions, written
from lowmem_reft.runs.train import run_training
from small_runs import small_run


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> TrainOptions:
    """Of a base without weights."""
    shape = tmp_path / "shape"
    shutil.copytree(tiny_llama_dir, shape, ignore=shutil.ignore_patterns("*.safetensors"))
    return written.changed(small_run(shape, tmp_path), dry_run=True, memory_gib=1.0, reuse="off")


def test_the_peak_is_not_below_that_of_the_run(
    options: TrainOptions, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    said = run_training(options)
    assert not options.run.output_dir.exists()
    real = written.changed(options, dry_run=False, model=str(tiny_llama_dir), json=True)
    # A process of its own: what other tests hold would be counted.
    command = [sys.executable, "-m", "lowmem_reft", "train", *written.flags(real)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    done = json.loads(ran.stdout.splitlines()[-1])
    assert said["fits"]
    assert 1 <= said["peak_bytes"] / done["peak_bytes"] < 1.3
    assert (said["num_steps"], said["num_examples"]) == (done["num_steps"], 4)
    assert said["required_bytes"] <= said["memory_bytes"] == 2**30


def test_the_options_are_the_resolved_ones_and_run_again(
    options: TrainOptions, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = written.changed(options, rank=None, lr=None, json=True)
    assert cli.main(["train", *written.flags(options)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["options"]["rank"], said["options"]["storage"]) == (8, "fp32")
    again = written.build(TrainOptions, **{**said["options"], "dry_run": True})
    assert run_training(again)["peak_bytes"] == said["peak_bytes"]


def test_of_an_adapter_adamw_stands_for_an_optimizer_that_is_not_predicted(
    options: TrainOptions,
) -> None:
    peak = run_training(options)["peak_bytes"]
    assert run_training(written.changed(options, optim="paged_adamw_8bit"))["peak_bytes"] == peak
    full = written.changed(options, method="full", rank=None, positions=None)
    full = written.changed(full, optim="paged_adamw_8bit")
    with pytest.raises(InputError, match=r"optim must be one of .*'paged_adamw_8bit'"):
        run_training(full)


def test_what_does_not_fit_is_refused_or_said(options: TrainOptions) -> None:
    with pytest.raises(InputError, match="memory_gib must be at least"):
        run_training(written.changed(options, memory_gib=1e-5))
