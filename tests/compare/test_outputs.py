"""Directories of comparisons, searches and reports are tried before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_reft import cli
from lowmem_reft.compare.outputs import keep_rows
from lowmem_reft.data.rows import Row
from lowmem_reft.errors import InputError
from lowmem_reft.options import CompareOptions, RowsOptions

COMMANDS = {
    "compare": ["compare", "--methods", "lora", "--output-dir"],
    "sweep": ["sweep", "--space", "rank=1", "--output-dir"],
    "report": ["report", "SOURCE", "--output-dir"],
    "profile": ["profile", "--model", "m", "--output-dir"],
}


def refused(command: str, directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main([*COMMANDS[command], str(directory)]) == 2
    return capsys.readouterr().err.strip().split("\n")[-1]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("compare", "results.csv"),
        ("compare", "results.json"),
        ("report", "report.html"),
        ("report", "accuracy_vs_time.png"),
        ("profile", "timeline.png"),
    ],
)
def test_files_of_others_are_kept(
    tmp_path: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text("{}")
    assert "must be new, or of an earlier run" in refused(command, path.parent, capsys)
    assert path.read_text() == "{}"


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("compare", "cells"),
        ("sweep", "rows"),
        ("report", "results.csv"),
        ("profile", "profile.json"),
    ],
)
def test_nothing_is_written_through_links(
    tmp_path: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(tmp_path / "mine")
    said = refused(command, tmp_path / "out", capsys)
    assert "output_dir must not hold links where outputs go" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_below_a_file_is_refused(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    said = refused(command, tmp_path / "file" / "out", capsys)
    assert "output_dir must be where files can be made" in said


def test_rows_of_the_users_are_not_replaced_by_those_for_the_cells(tmp_path: Path) -> None:
    rows = [Row(source="a", prompt="a", response="b")]
    options = CompareOptions(output_dir=tmp_path)
    path = keep_rows(options, "data/train.jsonl", rows)
    assert keep_rows(options, "data/train.jsonl", rows) == path  # no cell ran: still the same
    path.write_text('{"prompt": "mine", "response": "x"}\n')
    (tmp_path / "script.py").write_text("")  # the directory is the user's own
    with pytest.raises(InputError, match=r"with another data/train\.jsonl"):
        keep_rows(options, "data/train.jsonl", rows)
    (tmp_path / "cells").mkdir()
    read = CompareOptions(output_dir=tmp_path, rows=RowsOptions(data=str(path)))
    with pytest.raises(InputError, match="output_dir must be another file than data"):
        keep_rows(read, "data/train.jsonl", rows)
    assert "mine" in path.read_text()
    keep_rows(options, "data/train.jsonl", rows)
    assert "mine" not in path.read_text()
