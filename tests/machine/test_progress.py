"""How far a process is, in lines of its log, for another one that watches it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem_reft.machine import progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock, with progress in lines."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "_lines", progress._Lines())
    progress.say_in_lines()
    return now


def test_lines_tell_every_new_work_and_then_as_often_as_is_needed(
    seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(1, 101):
        seconds[0] += 0.1
        progress.tell("step", step, 100)
    for number in (1, 3):  # what is done at once is not told
        for _ in progress.progress(range(number), f"scoring {number}", quiet=True):
            pass
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0] == "progress: step 1/100"
    assert lines[-1] == "progress: scoring 3 0/3"
    assert not any("scoring 1" in line for line in lines)
    assert 4 <= len(lines) <= 7


def test_nothing_is_told_in_lines_unless_that_is_wanted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress.tell("step", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_the_last_line_is_found_among_others(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert progress.last_told(log) == ""
    log.write_text("Loading\n" * 5000)
    assert progress.last_told(log) == ""
    log.write_text(
        "progress: step 1/4\nwarning\n" * 300 + "progress: step 2/4\nwarning\nprogress: st"
    )
    assert progress.last_told(log) == "step 2/4"
