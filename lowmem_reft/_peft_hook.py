"""Makes ``import lowmem_reft`` enough for PEFT to know our methods, without importing torch for it.

PEFT has no plug-in entry point: a method exists once the module that registers it is imported.
The tuners do that, but they need torch, which ``lowmem-reft --help`` must not wait for. So they
are imported right away if ``peft`` is already there, and otherwise as soon as somebody, this
package's own modules included, has imported ``peft``. The hook then removes itself, and what
transformers says of ``peft``'s version says from then on what to do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TUNERS = ("lowmem_reft.reft.tuner", "lowmem_reft.reft.lora_reft", "lowmem_reft.methods.weights")


def install() -> None:
    """Register our methods now if PEFT has been imported, else right after it will be."""
    if "peft" in sys.modules:
        _import_tuners()
    else:
        sys.meta_path.insert(0, _AfterPeft())


def _import_tuners() -> None:
    for name in _TUNERS:
        importlib.import_module(name)
    method = importlib.import_module("lowmem_reft.reft.peft_method")
    method.explain_peft_check()
    method.refuse_partial_adapters()


class _AfterPeft(MetaPathFinder):
    """Imports the tuners after the outermost of ``peft`` and this package's own modules.

    The outermost, because the tuners need the rest of the package: ``lowmem_reft.reft.config``
    imports ``peft`` before it has defined ``ReftConfig``, and importing the tuners just then would
    fail.
    """

    def __init__(self) -> None:
        self.loading: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec the other finders give, with a loader that reports to this hook."""
        if fullname != "peft" and not fullname.startswith("lowmem_reft."):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ReportingLoader(spec.loader, self)
                return spec
        return None

    def import_tuners_if_due(self) -> None:
        """Import the tuners and retire, once ``peft`` is complete and nothing is half-imported."""
        if "peft" in sys.modules and not self.loading and self in sys.meta_path:
            sys.meta_path.remove(self)
            _import_tuners()


class _ReportingLoader(Loader):
    """A module's real loader, with a note to the hook before and after the module's code runs."""

    def __init__(self, loader: Loader, hook: _AfterPeft) -> None:
        self._loader = loader
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Left to the real loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, with no trace of the hook on it; import the tuners if that is due."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._hook.loading.add(module.__name__)
        try:
            self._loader.exec_module(module)
        finally:
            self._hook.loading.discard(module.__name__)
        self._hook.import_tuners_if_due()
