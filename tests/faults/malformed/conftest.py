"""The valid inputs, once per session, and a table of what became of the malformed ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from malformed.commands import no_engine
from malformed.fault import OUTCOMES
from malformed.world import World

COLUMNS = ("inputs", *OUTCOMES)


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Cells take no time, and what is written to an empty path goes to a directory of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lowmem_reft.compare.queue.open_engine", no_engine)
    monkeypatch.setattr("lowmem_reft.compare.sweep.runner.open_engine", no_engine)


@pytest.fixture(scope="session")
def world(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("malformed"), tiny_llama_dir)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found: dict[str, dict[str, int]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for kind, counts in getattr(report, "user_properties", ()):
                if getattr(report, "when", None) == "call" and isinstance(counts, dict):
                    before = found.setdefault(kind, dict.fromkeys(COLUMNS, 0))
                    found[kind] = {name: before[name] + counts.get(name, 0) for name in COLUMNS}
    if not found:
        return
    found["all"] = {name: sum(row[name] for row in found.values()) for name in COLUMNS}
    terminalreporter.section("malformed inputs")
    terminalreporter.line(f"{'kind':<24}" + "".join(f"{name:>18}" for name in COLUMNS))
    for kind, row in found.items():
        terminalreporter.line(f"{kind:<24}" + "".join(f"{row[name]:>18}" for name in COLUMNS))
