"""Where outputs go is tried before the work: nothing of the user's is lost or in the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lowmem_reft.errors import InputError
from lowmem_reft.machine.destinations import check_directory, check_file


def test_a_new_file_below_new_directories_is_accepted_and_nothing_is_made(tmp_path: Path) -> None:
    check_file("output", tmp_path / "a" / "b" / "out.jsonl")
    check_directory("output_dir", tmp_path / "c" / "d", written=("x/", "y.json"))
    assert list(tmp_path.iterdir()) == []


def _link(path: Path) -> Path:
    path.with_name("target").write_text("mine")
    path.symlink_to(path.with_name("target"))
    return path


def _dangling(path: Path) -> Path:
    path.symlink_to(path.with_name("nowhere"))
    return path


def _directory(path: Path) -> Path:
    path.mkdir()
    return path


def _below_a_file(path: Path) -> Path:
    path.write_text("mine")
    return path / "out.jsonl"


def _below_a_link_to_nowhere(path: Path) -> Path:
    return _dangling(path) / "out.jsonl"


def _other_content(path: Path) -> Path:
    path.write_text("mine")
    return path


def _long(path: Path) -> Path:
    return path.with_name("x" * 300)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_link, "must not be a link"),
        (_dangling, "must not be a link"),
        (_directory, "must be a file, got the directory"),
        (_below_a_file, "is no directory"),
        (_below_a_link_to_nowhere, "is no directory"),
        (_other_content, "holds something else"),
        (_long, "too long"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], words: str
) -> None:
    path = make(tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=f"^predictions .*{words}"):
        check_file("predictions", path, is_ours=lambda _: False)


@pytest.mark.parametrize("kind", ["same", "hard", "parent"])
def test_what_is_read_is_not_written_under_any_name(tmp_path: Path, kind: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    if kind == "hard":
        os.link(data, tmp_path / "other.jsonl")
    names = {"same": data, "hard": tmp_path / "other.jsonl"}
    path = names.get(kind, tmp_path / "x" / ".." / "data.jsonl")
    (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="output must be another file than data"):
        check_file("output", path, sources={"data": str(data)})


def test_a_place_where_no_files_can_be_made_is_refused() -> None:
    if not Path("/proc/self").is_dir():
        pytest.skip("there is no /proc")
    with pytest.raises(InputError, match="must be where files can be made"):
        check_file("output", Path("/proc/self/out.jsonl"))


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full", "/dev/stdout"])
def test_devices_are_accepted(device: str) -> None:
    check_file("output", Path(device))


def test_a_directory_that_the_user_names_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "scratch")
    check_directory("output_dir", tmp_path / "runs", written=("result.json",))


@pytest.mark.parametrize("place", ["result.json", "adapter", "adapter/README.md", "reuse"])
def test_links_where_outputs_go_are_refused(tmp_path: Path, place: str) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    path = tmp_path / "run" / place
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    with pytest.raises(InputError, match="output_dir must not hold links"):
        check_directory(
            "output_dir",
            tmp_path / "run",
            written=("adapter/", "result.json"),
            shared=("reuse/",),
        )


def test_links_elsewhere_in_the_directory_are_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tmp_path / "nowhere")
    check_directory("output_dir", tmp_path, written=("adapter/", "result.json"))


def test_a_file_where_a_directory_goes_is_refused_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("")
    with pytest.raises(InputError, match="room for the directory adapter"):
        check_directory("output_dir", tmp_path, written=("adapter/",))
    (tmp_path / "result.json").mkdir()
    with pytest.raises(InputError, match=r"room for the file result\.json"):
        check_directory("output_dir", tmp_path, written=("result.json",))


def test_what_is_read_from_a_directory_that_is_written_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "checkpoint-5" / "merged"
    model.mkdir(parents=True)
    with pytest.raises(InputError, match="output_dir must be another place than that of model"):
        check_directory(
            "output_dir", tmp_path, written=("checkpoint-[0-9]*/",), sources={"model": model}
        )


def test_what_others_have_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("mine")
    with pytest.raises(InputError, match=r"must be new, or of an earlier run .* results\.csv"):
        check_directory(
            "output_dir", tmp_path, written=("results.*",), is_ours=lambda path: path != tmp_path
        )
