"""A run writes its options beside its result; --config repeats it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowmem_reft import cli
from lowmem_reft.errors import InputError
from lowmem_reft.options import TrainOptions, written
from lowmem_reft.runs.train import run_training
from small_runs import adapter_of, small_run, with_run


def repeated(options: TrainOptions, tmp_path: Path) -> Any:
    path = options.run.output_dir / "run.yaml"
    return cli._parse(["train", "--config", str(path), "--output-dir", str(tmp_path / "again")])


def test_a_run_is_repeated_by_its_own_file(tiny_llama_dir: Path, tmp_path: Path) -> None:
    options = small_run(tiny_llama_dir, tmp_path)
    run_training(options)
    again = repeated(options, tmp_path)
    run_training(again)
    assert adapter_of(again) == adapter_of(options)


def test_it_is_the_same_run_in_the_same_directory(tiny_llama_dir: Path, tmp_path: Path) -> None:
    options = written.changed(small_run(tiny_llama_dir, tmp_path), compute_dtype="auto")
    run_training(options)
    path = options.run.output_dir / "run.yaml"
    run_training(cli._parse(["train", "--config", str(path)]))  # not refused as another one
    with pytest.raises(InputError, match=r"a finished run with other settings.*: rank 3 instead"):
        run_training(cli._parse(["train", "--config", str(path), "--rank", "3"]))


def test_the_file_holds_what_defaults_stood_for(tiny_llama_dir: Path, tmp_path: Path) -> None:
    options = small_run(tiny_llama_dir, tmp_path)
    options = written.changed(options, lr=None, rank=None, memory_gib=3.0)
    run_training(options)
    again = repeated(options, tmp_path)
    assert (again.method.rank, again.memory.memory_gib, again.data.max_length) == (8, None, 512)
    assert again.optim.lr == float(f"{2 * 9e-4 * (4096 / 64) ** 0.5:.2g}")  # of four blocks


def test_a_file_of_the_users_is_not_replaced(tiny_llama_dir: Path, tmp_path: Path) -> None:
    options = small_run(tiny_llama_dir, tmp_path)
    options.run.output_dir.mkdir()
    (options.run.output_dir / "run.yaml").write_text("rank: 3\n")
    with pytest.raises(InputError, match="output_dir must be a new file"):
        run_training(with_run(options))
