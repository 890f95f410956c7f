"""Many runs: cells, where they run, equal budgets, the search, the report.

The package can be called: ``lowmem_reft.compare(...)`` is ``lowmem_reft.api.compare(...)``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_reft.machine.lazy import call_as, names_on_use

if TYPE_CHECKING:
    from lowmem_reft.compare.matrix import run_comparison

__all__ = ["run_comparison"]

__getattr__, __dir__ = names_on_use(__name__, {"matrix": __all__})
call_as(__name__, "lowmem_reft.api:compare")
