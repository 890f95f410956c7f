"""Files are complete or absent, whatever happens while they are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import fits, open_itself, parse_json, write_json, write_whole


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


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.write_text("mine")
    link.symlink_to(mine)
    write_json(link, {})
    assert not link.is_symlink()
    (tmp_path / f".next.{os.getpid()}.tmp").symlink_to(mine)  # where the next one is made
    write_json(tmp_path / "next", {})
    link.unlink()
    link.symlink_to(mine)
    with pytest.raises(InputError, match="must not be a link"):
        open_itself(link, "w")
    assert mine.read_text() == "mine"


def test_a_device_stays_one() -> None:
    assert write_whole(Path("/dev/null"), lambda part: part.write_text("x")).is_char_device()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, "{", b"\xff\xfe", "", '"\\ud800"', "[]".encode("utf-16")]
)
def test_what_is_no_json_is_one_kind_of_error(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (True, float, False),
        (float("nan"), float | None, False),
        (10**400, float, False),
        (None, float | None, True),
        ("a", Literal["a", "b"], True),
        (1, Literal[True], False),
        ([1, None], list[float | None], True),
        ([1, "x"], list[float | None], False),
        ({"a": 1}, dict[str, float], True),
        ({"a": []}, dict[str, float] | None, False),
        ([], dict[str, Any], False),
    ],
)
def test_values_of_json_are_of_a_type_or_not(value: Any, hint: Any, expected: bool) -> None:
    assert fits(value, hint) is expected
