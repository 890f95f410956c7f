"""--import: modules of the user's, in this process and in those of a comparison."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lowmem_reft import cli
from lowmem_reft.data.tasks.registry import TASKS
from lowmem_reft.errors import InputError
from lowmem_reft.machine import own_modules

MODULE = """
from lowmem_reft.data.tasks.registry import TASKS

TASKS["of_mine"] = TASKS["trec"]
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(own_modules.VARIABLE, "")
    monkeypatch.setitem(TASKS, "of_mine", TASKS["trec"])
    del TASKS["of_mine"]
    sys.modules.pop("of_mine", None)
    Path("of_mine.py").write_text(MODULE)


def test_what_a_module_adds_is_known_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "--json", "--import", "of_mine"]) == 0
    assert '"of_mine"' not in capsys.readouterr().err
    assert "of_mine" in TASKS


def test_the_processes_of_a_comparison_import_it_too() -> None:
    assert own_modules.take(["compare", "--import=of_mine"]) == ["compare"]
    TASKS.pop("of_mine")
    sys.modules.pop("of_mine")
    own_modules.load()  # as a child does, whose environment is this one
    assert "of_mine" in TASKS


def test_another_module_is_another_cell() -> None:
    assert own_modules.digests() == {}
    own_modules.take(["--import", "of_mine"])
    before = own_modules.digests()
    Path("of_mine.py").write_text(MODULE + "# changed")
    assert json.dumps(own_modules.digests()) != json.dumps(before)


@pytest.mark.parametrize("words", [["--import"], ["--import", "of_nobody"], ["--import", "broken"]])
def test_what_cannot_be_imported_is_said(words: list[str]) -> None:
    Path("broken.py").write_text("1 / 0")
    with pytest.raises(InputError, match="import must"):
        own_modules.take(words)
