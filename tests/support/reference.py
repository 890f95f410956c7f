"""The independent reference of parity tests: dequantized weights, float64, plain nn.Linear."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def dequantized_weight(module: nn.Module) -> Tensor:
    """Return what a bitsandbytes layer multiplies by, of shape (out_features, in_features)."""
    if isinstance(module, Linear4bit):
        return dequantize_4bit(module.weight.data, module.weight.quant_state)
    constants = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    return int8_vectorwise_dequant(module.weight.data, constants)


def dequantized_copy(model: Model, dtype: torch.dtype = torch.float64) -> Model:
    """Deep copy with an nn.Linear of the dequantized weight for every quantized layer, in dtype.

    Adapters and hooks are copied along. Whatever the dtype, transformers computes RMSNorm, the
    rotary tables and the eager softmax in fp32, so a float64 copy is good to about 1e-7 relative
    (logits and gradients of the tiny Llama, against a float64 one with these parts in float64).
    """
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Linear4bit | Linear8bitLt):
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            linear.weight = nn.Parameter(dequantized_weight(module), requires_grad=False)
            if module.bias is not None:
                linear.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=False)
            linear.train(module.training)
            twin.set_submodule(name, linear)
    return nn.Module.to(twin, dtype)  # transformers' own refuses models that were quantized


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest deviation from the reference, divided by the largest reference value."""
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).abs().max() / reference.abs().max())
