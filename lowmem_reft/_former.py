"""Names that modules had before the package had folders: they work until the next release."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

_NOW = {
    "checkpointing": "base.checkpointing",
    "config": "reft.config",
    "das": "runs.das",
    "embedded": "data.embedded",
    "evaluate": "runs.evaluate",
    "generate": "runs.generate",
    "interventions": "reft.interventions",
    "loss": "base.loss",
    "positions": "reft.positions",
    "rows": "data.rows",
    "tasks": "data.tasks",
    "train": "runs.train",
    "trainers": "reuse.mixins",
}
"""What the documentation named."""


class _Former(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        known = package == "lowmem_reft" and rest.partition(".")[0] in _NOW
        return spec_from_loader(fullname, self) if known else None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of the one that was asked for."""
        former = module.__name__
        first, dot, rest = former.partition(".")[2].partition(".")
        now = f"lowmem_reft.{_NOW[first]}{dot}{rest}"
        message = f"{former} is now {now}; use that name, this one goes with the next release"
        warnings.warn(message, FutureWarning, stacklevel=2)
        sys.modules[former] = importlib.import_module(now)


def install() -> None:
    """Let imports of the former names find the modules of today."""
    sys.meta_path.insert(0, _Former())  # before a former package finds its modules by itself
