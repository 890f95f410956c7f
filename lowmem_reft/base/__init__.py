"""The frozen base: loaded, quantized, in part, made up; what lets it need less memory; its loss."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any
from unittest import mock

from lowmem_reft.machine.lazy import names_on_use

if TYPE_CHECKING:
    from lowmem_reft.base.hub import load_config
    from lowmem_reft.base.loading import load_base, load_tokenizer, save_base
    from lowmem_reft.base.quantization import count_as_stored

__all__ = ["count_as_stored", "load_base", "load_config", "load_tokenizer", "save_base"]
_MODULES = {
    "hub": ["load_config"],
    "loading": ["load_base", "load_tokenizer", "save_base"],
    "quantization": ["count_as_stored"],
}

__getattr__, __dir__ = names_on_use(__name__, _MODULES)


def import_bitsandbytes_without_compiler() -> None:
    """Import bitsandbytes without torch's compiler, which takes longer to import than a plan takes.

    bitsandbytes wraps its CPU optimizers in ``torch.compile`` at import; a plan runs none of them.
    """
    import torch

    def leave(function: Any = None, **_options: Any) -> Any:
        return leave if function is None else function

    with mock.patch.object(torch, "compile", leave):
        importlib.import_module("bitsandbytes")
