"""ReFT on a frozen 4- or 8-bit base, as an ordinary PEFT method.

::

    import lowmem_reft as lr
    from peft import get_peft_model

    base = lr.load_base("meta-llama/Llama-3.1-8B", storage="nf4")
    model = get_peft_model(base, lr.ReftConfig(task_type="CAUSAL_LM", rank=8, positions="all"))

Importing the package loads no torch; each name below is imported when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lowmem_reft import _former, _peft_hook
from lowmem_reft.errors import InputError
from lowmem_reft.machine import notices
from lowmem_reft.machine.lazy import names_on_use

if TYPE_CHECKING:
    from lowmem_reft import compare
    from lowmem_reft.api import evaluate, generate, plan, train
    from lowmem_reft.base.loading import load_base, load_tokenizer, save_base
    from lowmem_reft.reft.composition import keep_orthogonal
    from lowmem_reft.reft.config import ReftConfig
    from lowmem_reft.reft.tuner import ReftModel

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "ReftConfig",
    "ReftModel",
    "__version__",
    "compare",
    "evaluate",
    "generate",
    "keep_orthogonal",
    "load_base",
    "load_tokenizer",
    "plan",
    "save_base",
    "train",
]

_named, __dir__ = names_on_use(
    __name__,
    {
        "api": ["evaluate", "generate", "plan", "train"],
        "reft.composition": ["keep_orthogonal"],
        "base.loading": ["load_base", "load_tokenizer", "save_base"],
        "reft.config": ["ReftConfig"],
        "reft.tuner": ["ReftModel"],
    },
)


def __getattr__(name: str) -> Any:
    """Return ``compare``, a package that can be called, or what a module has under a name."""
    return importlib.import_module(f"{__name__}.compare") if name == "compare" else _named(name)


notices.hide()  # first: the tuners import who says them
_former.install()
_peft_hook.install()
