"""Checkpoints are whole, or stepped over; what no run wrote is left alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from lowmem_reft.errors import InputError
from lowmem_reft.machine import files
from lowmem_reft.machine.locks import alone
from lowmem_reft.options import TrainOptions
from lowmem_reft.runs import checkpoints
from lowmem_reft.runs.checkpoints import OWN
from lowmem_reft.runs.train import run_training
from small_runs import adapter_of, small_run, with_optim, with_run


@pytest.fixture
def options(tiny_llama_dir: Path, tmp_path: Path) -> TrainOptions:
    return small_run(tiny_llama_dir, tmp_path, validated=True)


@pytest.fixture
def whole(options: TrainOptions, tmp_path: Path) -> bytes:
    """The weights of a run that nobody disturbs."""
    undisturbed = with_run(options, output_dir=tmp_path / "whole")
    run_training(undisturbed)
    return adapter_of(undisturbed)


@pytest.fixture
def unfinished(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> TrainOptions:
    """A run that has its checkpoints of steps 1, 2 and 3, all of them, and no result."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "remove", lambda _: None)
        run_training(options)
    run = options.run.output_dir
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-4")
    (run / "result.json").unlink()
    return with_run(options, resume=True)


FILES = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("damage", ["cut", "missing", "changed", "note", "no note"])
def test_a_checkpoint_that_is_not_whole_is_stepped_over_and_named(
    unfinished: TrainOptions,
    whole: bytes,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    last = unfinished.run.output_dir / "checkpoint-3"
    path = last / "optimizer.pt"
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "missing":
        path.unlink()
    elif damage == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "note":
        note = json.loads((last / checkpoints.NOTE).read_text())
        (last / checkpoints.NOTE).write_text(json.dumps({**note, "since": {}}))
    else:
        (last / checkpoints.NOTE).unlink()
        (last / "trainer_state.json").unlink()
    run_training(unfinished)
    said = capsys.readouterr().err
    assert "checkpoint-3 is not whole (" in said
    assert "goes on from step 2" in said
    assert adapter_of(unfinished) == whole


def test_a_run_none_of_whose_checkpoints_is_whole_begins_anew_and_says_so(
    unfinished: TrainOptions, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in unfinished.run.output_dir.glob("checkpoint-*"):
        (path / "scheduler.pt").unlink()
    run_training(unfinished)
    assert "begins anew, as it left no whole checkpoint" in capsys.readouterr().err
    assert adapter_of(unfinished) == whole


@pytest.mark.parametrize("says_so", [True, False])
def test_a_full_disk_is_named_and_the_run_goes_on_from_the_checkpoint_before(
    options: TrainOptions, whole: bytes, monkeypatch: pytest.MonkeyPatch, says_so: bool
) -> None:
    save, num = torch.save, []
    no_space = OSError(errno.ENOSPC, "No space left on device")

    def refuse(_: Path) -> None:
        raise no_space

    def full(content: object, path: str, *args: object) -> None:
        num.append(path)
        if len(num) > 5:
            Path(path).write_bytes(b"half")
            if says_so:
                raise no_space
            patch.setattr(files, "sync", refuse)
            raise RuntimeError("unexpected pos 64 vs 0")  # as torch does
        save(content, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run_training(options)
    names = [path.name for path in options.run.output_dir.glob("checkpoint-*")]
    assert len(names) == 1
    run_training(with_run(options, resume=True))
    assert adapter_of(options) == whole
    assert [path.name for path in (options.run.output_dir / OWN).iterdir()] == ["lock"]


def test_a_checkpoint_of_the_run_before_is_not_gone_on_from(
    options: TrainOptions, tmp_path: Path
) -> None:
    other = with_optim(options, epochs=1)
    run_training(other)
    kept = tmp_path / "kept"
    shutil.copytree(other.run.output_dir / "checkpoint-2", kept)
    run_training(with_run(options, overwrite=True))
    first = adapter_of(options)
    shutil.rmtree(options.run.output_dir / "checkpoint-4")
    shutil.copytree(kept, options.run.output_dir / "checkpoint-7")
    run_training(with_run(options, resume=True))
    assert adapter_of(options) == first


def test_epochs_and_best_weights_of_a_checkpoint_count_whatever_lies_beside_it(
    unfinished: TrainOptions, whole: bytes
) -> None:
    run = unfinished.run.output_dir
    (run / "epochs.jsonl").write_text('{"epoch": 1.0, "metric": "x", "value": 9, "loss": 0}\n')
    (run / "best.safetensors").write_bytes(b"of another epoch")
    result = run_training(unfinished)
    assert [line["value"] < 9 for line in result["validation"]] == [True, True]
    assert adapter_of(unfinished) == whole


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_a_checkpoint_that_no_run_wrote_is_refused_and_left(
    options: TrainOptions, tmp_path: Path, kind: str, resume: bool
) -> None:
    run_training(options)
    mine = options.run.output_dir / "checkpoint-77"
    if kind == "directory":
        mine.mkdir()
        (mine / "trainer_state.json").write_text("{}")
        (mine / "mine.bin").write_text("years of work")
    elif kind == "file":
        mine.write_text("years of work")
    else:
        (tmp_path / "elsewhere").mkdir()
        mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="checkpoint-77"):
        run_training(with_run(options, resume=resume))
    assert mine.exists()
    assert (options.run.output_dir / "adapter").is_dir()
    assert (options.run.output_dir / "result.json").is_file()


@pytest.mark.parametrize("name", ["adapter", "epochs.jsonl", "best.safetensors", "run.json"])
def test_what_a_run_would_replace_and_none_wrote_is_refused_and_left(
    options: TrainOptions, name: str
) -> None:
    mine = options.run.output_dir / name
    if name == "adapter":
        mine.mkdir(parents=True)
        mine /= "adapter_model.safetensors"
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text('{"mine": 1}')
    with pytest.raises(InputError, match=name):
        run_training(options)
    assert mine.read_text() == '{"mine": 1}'


@pytest.mark.parametrize("name", ["adapter", "result.json", "run.json", OWN])
def test_a_run_writes_through_no_link(options: TrainOptions, tmp_path: Path, name: str) -> None:
    run_training(options)
    path, elsewhere = options.run.output_dir / name, tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(InputError, match=r"must (not )?hold (no )?links?"):
        run_training(options)
    assert path.is_symlink()
    assert elsewhere.exists()


def test_files_of_the_user_beside_a_run_and_its_adapter_stay(options: TrainOptions) -> None:
    run = options.run.output_dir
    notes = [run / "notes.txt", run / "checkpoint-best", run / "adapter" / "notes.txt"]
    run.mkdir()
    for path in notes[:2]:
        path.write_text("mine")
    run_training(options)
    notes[2].write_text("mine")
    run_training(options)
    assert [path.read_text() for path in notes] == ["mine"] * 3


def test_a_second_run_on_a_directory_is_refused_while_the_first_is_at_work(
    options: TrainOptions,
) -> None:
    run = options.run.output_dir
    (run / OWN).mkdir(parents=True)
    with (
        alone(run, run / OWN / "lock"),
        pytest.raises(InputError, match=rf"one run at a time, .* \(process {os.getpid()} on"),
    ):
        run_training(options)
    run_training(options)


def test_a_run_that_had_begun_and_saved_nothing_begins_anew_and_says_so(
    options: TrainOptions, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(options)
    shutil.rmtree(options.run.output_dir / "checkpoint-4")
    shutil.rmtree(options.run.output_dir / "adapter")
    run_training(with_run(options, resume=True))
    assert "begins anew" in capsys.readouterr().err
    assert adapter_of(options) == whole
    run_json = json.loads((options.run.output_dir / "run.json").read_text())
    assert run_json["lr"] == 1e-2
