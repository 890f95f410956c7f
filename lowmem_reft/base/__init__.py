"""The frozen base: loaded, quantized, in part, made up; what lets it need less memory; its loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowmem_reft.machine.lazy import names_on_use

if TYPE_CHECKING:
    from lowmem_reft.base.loading import (
        count_as_stored,
        load_base,
        load_config,
        load_tokenizer,
        save_base,
    )

__all__ = ["count_as_stored", "load_base", "load_config", "load_tokenizer", "save_base"]

__getattr__, __dir__ = names_on_use(__name__, {"loading": __all__})
