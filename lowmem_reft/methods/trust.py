"""What an adapter's configuration must not ask for: code, or files of others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem_reft.errors import InputError
from lowmem_reft.machine.destinations import read_or_none
from lowmem_reft.machine.limits import TimeLimitError, time_limit

_SECONDS = 1.0
"""Of the processor, for a pattern on all of ``_NAMES``."""
_NAMES = tuple(
    f"{blocks}.{layer}.{part}"
    for blocks in ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers")
    for layer in (0, 31)
    for part in ("self_attn.q_proj", "mlp.down_proj", "attn.c_attn", "attention.query_key_value")
)
"""Of modules, as patterns of adapters meet them."""


def check_adapter_config(directory: Path) -> None:
    """Refuse an adapter that PEFT (0.21) would load other modules or adapters for.

    X-LoRA loads the adapters that its configuration names, from the hub too; LoRA imports the
    module that ``megatron_core`` names where there is a ``megatron_config``.

    Raises:
        InputError: It is such an adapter, or one with a pattern that does not end.
    """
    path = directory / "adapter_config.json"
    config = read_or_none(path)
    if not isinstance(config, dict):
        return  # which is refused where it is read
    of_tokenizer = config.get("tokenizer_kwargs")
    asked = {
        "peft_type": config.get("peft_type") == "XLORA",
        "megatron_config": bool(config.get("megatron_config")),
        "tokenizer_kwargs": isinstance(of_tokenizer, dict) and "trust_remote_code" in of_tokenizer,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise InputError(
                f"{path} must not ask for code or files of others, got {name} {config[name]!r}; "
                "use an adapter without it"
            )
    for pattern in _patterns(config):
        try:
            with time_limit(_SECONDS):
                for name in _NAMES:
                    re.match(pattern, name)
        except TimeLimitError:
            raise InputError(
                f"{path} must name modules by patterns that end, got {pattern!r}, which does not; "
                "use an adapter without it"
            ) from None
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(
                f"{path} must name modules by regular expressions, got {pattern!r} ({error}); "
                "save the adapter again"
            ) from error


def _patterns(config: dict[str, Any]) -> Iterator[str]:
    """What PEFT matches the names of modules with."""
    chosen = [config.get(name) for name in ("target_modules", "exclude_modules")]
    yield from (pattern for pattern in chosen if isinstance(pattern, str))
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name)
        yield from patterns if isinstance(patterns, dict) else ()
