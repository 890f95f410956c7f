"""Refuses the weights of a ReFT adapter that is not whole, whoever loads it.

PEFT fills what it finds and at most warns of the rest: an intervention that stays at its start
edits nothing, or as it was drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from lowmem_reft.base.stored import are_finite, some
from lowmem_reft.errors import InputError

_PREFIX = "base_model.model."
"""Of names in a PeftModel."""


def check_loaded(model: Any, adapter_name: str, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that are not all and only those of an adapter, or not finite.

    Args:
        model: What carries the adapter.
        adapter_name: Its name there.
        weights: By their names in the model.

    Raises:
        InputError: One is missing, has no place, or holds NaN or infinity.
    """
    given = {name.removeprefix(_PREFIX) for name in weights}
    wanted = {name.removeprefix(_PREFIX) for name in _own_names(model, adapter_name)}
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    known = wanted | {name.removeprefix(_PREFIX) for name, _ in named}
    for names, what in ((wanted - given, "none for"), (given - known, "no place for")):
        if names:
            raise InputError(
                f"adapter {adapter_name!r} must have the weights that its configuration describes, "
                f"got {what} {some(names)}; save or download it again"
            )
    wrong = next((name for name, tensor in weights.items() if not are_finite(tensor)), None)
    if wrong is not None:
        raise InputError(
            f"adapter {adapter_name!r} must hold finite numbers, got NaN or infinity in {wrong}; "
            "train it again, with a smaller learning rate, or download it again"
        )


def _own_names(model: Any, adapter_name: str) -> Iterator[str]:
    """Yield the names of an adapter's tensors: its interventions', and LoRA's beside them."""
    for place, module in model.named_modules():
        if adapter_name in getattr(module, "reft_phi", ()):
            for name in module.reft_phi[adapter_name].state_dict():
                yield f"{place}.reft_phi.{adapter_name}.{name}"
    for name, _ in model.named_parameters():
        parts = name.split(".")
        if adapter_name in parts and any(part.startswith("lora_") for part in parts):
            yield name
