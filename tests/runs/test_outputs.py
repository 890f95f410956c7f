"""Outputs are tried before a model is loaded, and what the user has is not written over."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft import cli
from lowmem_reft.runs.outputs import is_predictions

PREDICTION = {"source": "a:1", "prompt": "a", "prediction": 0, "reference": 0, "correct": True}


@pytest.fixture
def run(tiny_llama_dir: Path, films: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command on the films; returns exit code and last line of standard error."""

    def run(command: str, *words: Any, source: bool = True) -> tuple[int, str]:
        rows = {"generate": "--input"}.get(command, "--data")
        data = [rows, films] if source else []
        storage = ["--storage", "fp32", "--device", "cpu", "--quiet"]
        model = ["--model", tiny_llama_dir, *storage]
        code = cli.main([command, *map(str, [*model, *data, *words])])
        return code, capsys.readouterr().err.strip().split("\n")[-1]

    return run


@pytest.mark.usefixtures("no_base")
def test_the_rows_are_never_written_over(run: Any, films: Path, tmp_path: Path) -> None:
    before = films.read_text()
    os.link(films, tmp_path / "hard.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(films)
    for name in ("films.jsonl", "hard.jsonl", "soft.jsonl", "x/../films.jsonl"):
        (tmp_path / "x").mkdir(exist_ok=True)
        for command, flag in (("evaluate", "--predictions"), ("generate", "--output")):
            code, said = run(command, flag, tmp_path / name, *["--overwrite"][: flag == "--output"])
            assert code == 2
            assert f"{flag[2:]} must " in said
    assert films.read_text() == before


@pytest.mark.usefixtures("no_base")
def test_a_file_that_evaluate_did_not_write_is_kept(run: Any, tmp_path: Path) -> None:
    mine = tmp_path / "notes.txt"
    mine.write_text("mine\n")
    code, said = run("evaluate", "--predictions", mine)
    assert code == 2
    assert "predictions must be a new file, or one that this command wrote" in said
    assert mine.read_text() == "mine\n"


def test_predictions_of_before_are_replaced_once_the_new_ones_are_whole(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "predictions.jsonl"
    path.parent.mkdir()
    before = json.dumps(PREDICTION) + "\n"
    path.write_text(before)
    with monkeypatch.context() as patch:
        patch.setattr("lowmem_reft.runs.evaluate._prediction_lines", lambda *_: [{"a": object()}])
        assert run("evaluate", "--predictions", path)[0] == 1
    assert path.read_text() == before
    assert run("evaluate", "--predictions", path)[0] == 0
    assert len(path.read_text().splitlines()) == 8
    assert is_predictions(path)
    assert list(path.parent.iterdir()) == [path]


def test_predictions_on_a_full_disk_are_called_that(run: Any) -> None:
    code, said = run("evaluate", "--predictions", "/dev/full")
    assert code == 1
    assert "free some space" in said


def test_predictions_are_known_by_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    line = json.dumps(PREDICTION)
    of_the_harness = json.dumps({"task": "t", "doc_id": 0, "doc": {}, "target": "a"})
    for text, ours in {
        f"{line}\n{line}\n": True,
        f"{line}\n{line[:20]}": True,  # a process was killed here
        f"{of_the_harness}\n": True,
        f'{line}\n{{"prompt": "a"}}\n': False,
        '{"prompt": "a", "response": "b"}\n': False,
        "[1]\n": False,
        "[" * 100_000 + "\n": False,
    }.items():
        path.write_text(text)
        assert is_predictions(path) == ours


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize(
    "place", ["result.json", "adapter", "adapter/adapter_model.safetensors", "checkpoint-8"]
)
def test_training_writes_through_no_link(run: Any, tmp_path: Path, place: str) -> None:
    target, directory = tmp_path / "mine", tmp_path / "run"
    target.mkdir()
    (directory / place).parent.mkdir(parents=True)
    (directory / place).symlink_to(target)
    code, said = run("train", "--output-dir", directory)
    assert code == 2
    assert "output_dir must not hold links where outputs go" in said
    assert list(target.iterdir()) == []


@pytest.mark.usefixtures("no_base")
@pytest.mark.parametrize("name", ["result.json", "run.json", "adapter/adapter_config.json"])
def test_what_no_run_has_written_is_not_replaced(run: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    code, said = run("train", "--output-dir", tmp_path / "run")
    assert code == 2
    assert "output_dir must be new, or of an earlier run" in said
    assert path.read_text() == "{}"


@pytest.mark.usefixtures("no_base")
def test_rows_in_the_files_of_a_run_are_not_removed_by_it(
    run: Any, films: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({"model": "a", "data": "b"}))
    films.rename(directory / "epochs.jsonl")
    code, said = run(
        "train", "--data", directory / "epochs.jsonl", "--output-dir", directory, source=False
    )
    assert code == 2
    assert "output_dir must be another file than data" in said
    assert (directory / "epochs.jsonl").is_file()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("evaluate", "--predictions"), "predictions"),
        (("generate", "--output"), "output"),
        (("train", "--output-dir"), "output_dir"),
        (("train", "--output-dir", "out", "--reuse-dir"), "reuse_dir"),
    ],
)
@pytest.mark.usefixtures("no_base")
def test_a_place_below_a_file_is_refused_before_a_model_is_loaded(
    run: Any, films: Path, tmp_path: Path, words: tuple[str, ...], name: str
) -> None:
    command, *flags = [str(tmp_path / word) if word == "out" else word for word in words]
    code, said = run(command, *flags, films / "x")
    assert code == 2
    assert f"{name} must be where files can be made" in said
