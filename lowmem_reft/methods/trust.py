"""What an adapter's configuration must not ask for: code, or files of others."""

from __future__ import annotations

from pathlib import Path

from lowmem_reft.errors import InputError
from lowmem_reft.machine.destinations import read_or_none


def check_adapter_config(directory: Path) -> None:
    """Refuse an adapter that PEFT (0.21) would load other modules or adapters for.

    X-LoRA loads the adapters that its configuration names, from the hub too; LoRA imports the
    module that ``megatron_core`` names where there is a ``megatron_config``.

    Raises:
        InputError: It is such an adapter.
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
