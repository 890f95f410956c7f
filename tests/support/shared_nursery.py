"""One process for all tests of a worker that their cells are forked from.

Every comparison starts one of its own, which imports for seconds what a tiny cell needs for less
than one. ``tests/compare/test_forks.py`` has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lowmem_reft.compare.engines import forks, processes
from lowmem_reft.compare.engines.forks import Fork, Nursery
from warm import warm_processes

_OF_EACH_TEST = "PYTEST_CURRENT_TEST"


class SharedNursery(Nursery):
    """A nursery whose end is that of what it has forked since the last one."""

    def __init__(self, environment: dict[str, str], command: Sequence[str]) -> None:
        """Start it, as a fork itself: tests whose environments differ need one each.

        It ends with the process that it is forked from, if that of the tests is killed.
        """
        with pytest.MonkeyPatch.context() as patch, warm_processes():
            patch.setattr(forks, "dying_with_parent", list)
            super().__init__(environment, command)
        self._forks: list[Fork] = []

    @property
    def is_idle(self) -> bool:
        """Whether no comparison has forked from it that has not closed it."""
        return not self._forks

    @property
    def is_alive(self) -> bool:
        """Whether it can still fork."""
        return self._process.poll() is None

    def start(self, cell_path: Path) -> Fork:
        """Start the process of a cell, and remember it."""
        self._forks.append(super().start(cell_path))
        return self._forks[-1]

    def close(self) -> None:
        """End what runs."""
        for fork in self._forks:
            fork.kill()
            fork.wait()
        self._forks.clear()


@contextmanager
def shared_nursery() -> Iterator[None]:
    """Comparisons of the same environment and command share one while this lasts."""
    kept: dict[Any, SharedNursery] = {}

    def nursery(environment: dict[str, str], command: Sequence[str]) -> SharedNursery:
        known = {name: value for name, value in environment.items() if name != _OF_EACH_TEST}
        key = (*sorted(known.items()), *command)
        for other, each in list(kept.items()):
            # One of another environment would hold its libraries in memory to the end.
            if not each.is_alive or (other != key and each.is_idle):
                Nursery.close(kept.pop(other))
        if key not in kept:
            kept[key] = SharedNursery(known, command)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "Nursery", nursery)
        yield
    for each in kept.values():
        Nursery.close(each)
