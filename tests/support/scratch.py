"""What a predicted peak may be above a measured one beside its share: scratch of a product."""

from __future__ import annotations

import torch


def most_scratch(compute_dtype: str) -> int:
    """Return bytes: of bf16 with AMX oneDNN's copies are bounded, elsewhere they are known."""
    has_amx = torch.cpu.get_capabilities().get("amx_bf16")
    return 3 * 2**19 if has_amx and compute_dtype == "bf16" else 0
