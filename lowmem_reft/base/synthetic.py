"""Bases without a checkpoint: real classes and shapes, with no weights or random ones.

Predictions run on the meta device; benchmarks of memory and speed need only shapes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lowmem_reft.base.heads import freeze, from_config, set_labels
from lowmem_reft.base.quantization import guard_linear4bit, quantization_options
from lowmem_reft.base.residency import fill_buffers
from lowmem_reft.machine.devices import DTYPES
from lowmem_reft.options import Storage
from lowmem_reft.options.values import QUANTIZED


def base_on_meta(
    config: Any,
    *,
    storage: Storage = "nf4",
    compute_dtype: torch.dtype = torch.bfloat16,
    task_type: str = "CAUSAL_LM",
    num_labels: int | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Build what `load_base` would load, on the meta device: real classes and shapes, no weights.

    Arguments are those of `load_base`, but for the configuration in place of a checkpoint.

    Raises:
        InputError: The architecture has no such task, or is unknown.
    """
    dtype = compute_dtype if storage in QUANTIZED else DTYPES[storage]
    set_labels(config, task_type, num_labels)
    options = quantization_options("config", config, storage, dtype, task_type)
    chosen = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.device("meta"):
        base: Any = from_config(config, task_type, dtype=dtype, **chosen)
    quantization = options.get("quantization_config")
    if quantization is not None:
        quantizer = AutoHfQuantizer.from_config(quantization)
        quantizer.preprocess_model(model=base, device_map={"": "cpu"})
        # PEFT asks for these before it looks at a layer's class.
        base.hf_quantizer = quantizer
        base.quantization_method = quantization.quant_method
        base.is_loaded_in_4bit, base.is_loaded_in_8bit = storage != "int8", storage == "int8"
        for module in base.modules():
            if isinstance(module, Linear4bit):
                _quantize_4bit_on_meta(module, storage, dtype)
            elif isinstance(module, Linear8bitLt):
                values = torch.empty(module.weight.shape, dtype=torch.int8, device="meta")
                _give_8bit(
                    module, values, torch.empty(len(values), dtype=torch.float32, device="meta")
                )
            else:
                continue
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.to(dtype), requires_grad=False)
        quantizer.postprocess_model(base)  # which some models ask about
        del base.config.quantization_config  # or the configuration would be of a quantized one
    guard_linear4bit(base)
    freeze(base, task_type)
    base.eval()
    return cast(PreTrainedModel, base)


def _quantize_4bit_on_meta(module: Linear4bit, storage: str, dtype: torch.dtype) -> None:
    """Give a layer on the meta device the storages that quantizing it would make."""

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    num_weights, fp32 = module.in_features * module.out_features, torch.float32
    num_blocks = -(-num_weights // 64)
    absmax = QuantState(
        absmax=empty(-(-num_blocks // 256), dtype=fp32),
        code=empty(256, dtype=fp32),
        blocksize=256,
        dtype=fp32,
    )
    state = QuantState(
        absmax=empty(num_blocks, dtype=torch.uint8),
        shape=torch.Size((module.out_features, module.in_features)),
        code=empty(16, dtype=fp32),
        blocksize=64,
        quant_type=storage,
        dtype=dtype,
        offset=empty(dtype=fp32),
        state2=absmax,
    )
    _give_4bit(module, empty(-(-num_weights // 2), 1, dtype=torch.uint8), state)


def _give_4bit(module: Linear4bit, packed: Tensor, state: QuantState) -> None:
    module.weight = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=True,
        quant_type=state.quant_type,
        module=module,
        bnb_quantized=True,
    )
    module.quant_state = state


def _give_8bit(module: Linear8bitLt, values: Tensor, scales: Tensor) -> None:
    module.weight = Int8Params(values, requires_grad=False, CB=values, SCB=scales)
    module.state.CB, module.state.SCB = values, scales


def base_with_random_weights(
    config: Any, *, device: torch.device, seed: int = 0, **options: Any
) -> PreTrainedModel:
    """Build a base on a device with random weights, quantized ones drawn as they are stored.

    Nothing is ever there in full precision, so a base of any size takes what it takes when loaded.
    Outputs mean nothing, but are finite: memory and speed are those of a real checkpoint.

    ``options`` are those of `base_on_meta`.

    Raises:
        InputError: The architecture has no such task, or is unknown.
    """
    base = base_on_meta(config, **options)
    generator = torch.Generator(device).manual_seed(seed)
    for module in base.modules():
        if isinstance(module, Linear4bit):
            _fill_4bit(module, device, generator)
        elif isinstance(module, Linear8bitLt):
            values = _random_bytes(module.weight.shape, torch.int8, device, generator)
            _give_8bit(module, values, torch.full((len(values),), 0.05, device=device))
    tied: dict[int, nn.Parameter] = {}
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in tied:
                    tied[id(parameter)] = _random_parameter(name, parameter, device, generator)
                module._parameters[name] = tied[id(parameter)]
    fill_buffers(base, base, device)
    return base


def _random_parameter(
    name: str, parameter: nn.Parameter, device: torch.device, generator: torch.Generator
) -> nn.Parameter:
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if values.ndim >= 2:
        values.normal_(std=0.02, generator=generator)
    else:  # of a norm, or a bias
        values.fill_(0.0 if name == "bias" else 1.0)
    return nn.Parameter(values, requires_grad=False)


def _random_bytes(
    shape: Any, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Tensor:
    low, high = (-127, 128) if dtype == torch.int8 else (0, 256)
    return torch.randint(low, high, shape, dtype=dtype, device=device, generator=generator)


def _fill_4bit(module: Linear4bit, device: torch.device, generator: torch.Generator) -> None:
    weight: Any = module.weight
    state = weight.quant_state
    nested = state.state2
    state.absmax = _random_bytes(state.absmax.shape, torch.uint8, device, generator)
    state.code = get_4bit_type(state.quant_type, device=device)
    state.offset = torch.tensor(0.02, device=device)
    nested.absmax = torch.full(nested.absmax.shape, 0.01, device=device)
    nested.code = create_dynamic_map().to(device)
    _give_4bit(module, _random_bytes(weight.shape, torch.uint8, device, generator), state)
