"""Files are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lowmem_reft.machine.files import write_json, write_whole


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, lambda part: part.write_text("first"))

    def half(part: Path) -> None:
        part.write_text("sec")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_whole(path, half)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_json_takes_paths_and_has_null_for_what_is_not_a_number(tmp_path: Path) -> None:
    content = {"loss": float("nan"), "steps": (1, float("inf")), "at": tmp_path}
    path = write_json(tmp_path / "new" / "a.json", content)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "loss": None,
        "steps": [1, None],
        "at": str(tmp_path),
    }
