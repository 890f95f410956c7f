"""How the frozen weights are stored: quantized, guarded, and dequantized for a while.

4-bit storage is NF4 or FP4 with double quantization (QLoRA, https://arxiv.org/abs/2305.14314,
section 3); 8-bit storage is LLM.int8() (https://arxiv.org/abs/2208.07339).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Int8Params, Linear4bit, Params4bit
from torch import nn
from transformers import PreTrainedModel

from lowmem_reft.base.heads import from_config, has_head, head_names
from lowmem_reft.errors import InputError
from lowmem_reft.machine.devices import DTYPES
from lowmem_reft.options.values import QUANTIZED

STORAGES = (*QUANTIZED, *DTYPES)

_READ_AS_NUMBERS = {
    "mamba": ("dt_proj",),
    "gemma3n_text": ("prediction_coefs", "correction_coefs"),
}
"""Kind of text model to linear layers whose weights its code reads itself: never quantized."""


def quantization_options(
    model: str | Path, config: Any, storage: str, dtype: torch.dtype, task_type: str
) -> dict[str, Any]:
    """Return from_pretrained's options; a quantized checkpoint keeps its own, written to config."""
    skipped = None
    if has_head(task_type):
        # transformers guesses the last layer, which misses heads of several layers or with a bias.
        with torch.device("meta"):
            skipped = [f"^{name}" for name in head_names(from_config(config, task_type))]
    as_numbers = _READ_AS_NUMBERS.get(getattr(config.get_text_config(), "model_type", ""))
    held = getattr(config, "quantization_config", None)
    if held is None and as_numbers is not None:
        skipped = [*(skipped or ["lm_head"]), *as_numbers]
    if held is not None:
        held = held.to_dict() if hasattr(held, "to_dict") else held
        if not isinstance(held, dict):
            raise InputError(
                f"model must have a quantization_config that is an object, got {held!r} in the "
                f"config.json of {str(model)!r}; mend it"
            )
        _check_held_storage(model, held, storage)
        held["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        if skipped:
            held["llm_int8_skip_modules"] = (held.get("llm_int8_skip_modules") or []) + skipped
        config.quantization_config = held
    if held is not None or storage not in QUANTIZED:
        return {}
    quantization: Any = transformers.BitsAndBytesConfig
    return {
        "quantization_config": quantization(
            load_in_8bit=storage == "int8",
            load_in_4bit=storage != "int8",
            bnb_4bit_quant_type="nf4" if storage == "int8" else storage,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    }


def _check_held_storage(model: str | Path, held: dict[str, Any], storage: str) -> None:
    if held.get("load_in_8bit"):
        kind = "int8"
    elif held.get("load_in_4bit"):
        kind = held.get("bnb_4bit_quant_type", "fp4")
    else:
        raise InputError(
            f"model must be unquantized or quantized by bitsandbytes, got {str(model)!r} with "
            f"{held.get('quant_method')!r}; use another checkpoint of it"
        )
    if kind != storage:
        raise InputError(
            f"storage must be {kind} for {str(model)!r}, which is already quantized, "
            f"got {storage!r}; use {kind} or an unquantized checkpoint"
        )


def guard_linear4bit(model: nn.Module) -> None:
    """Keep 4-bit layers from repacking their weight, which breaks training after an evaluation.

    On a CPU with AVX512-BF16, in evaluation mode, bitsandbytes (0.50.2) repacks the weight in place
    for a kernel without a backward pass: gradients are wrong from then on, without an error, and
    the stored bytes have changed. `load_base` calls this; call it on models loaded otherwise.

    Raises:
        InputError: A weight is repacked already; its constants were rounded, so it is lost.
    """
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = getattr(module.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                raise InputError(
                    f"model must not have been evaluated yet, got a repacked weight in {name!r}; "
                    "load it again and call guard_linear4bit before its first forward pass"
                )
            module.support_avx512bf16_for_cpu = False


def hold_packed_as(base: nn.Module, dtype: torch.dtype) -> None:
    """Let tensors of a floating-point dtype hold the bytes of 4-bit weights.

    A sharded weight comes back as a plain tensor; its layer then has to know the constants.
    """
    for module in base.modules():
        if isinstance(module, Linear4bit) and not module.weight.is_meta:
            weight: Any = module.weight
            if weight.numel() * weight.element_size() % dtype.itemsize:
                continue  # accelerate leaves such a weight whole
            weight.data = weight.data.flatten().view(dtype)[:, None]
            weight.quant_storage = module.quant_storage = dtype
            module.quant_state = weight.quant_state


def dequantized_bytes(modules: Iterable[nn.Module], dtype: torch.dtype) -> int:
    """Return what the 4-bit layers in modules take in a dtype."""
    layers = (layer for module in modules for layer in module.modules())
    quantized = (layer for layer in layers if isinstance(layer, Linear4bit))
    return dtype.itemsize * sum(layer.in_features * layer.out_features for layer in quantized)


@contextlib.contextmanager
def dequantized(modules: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[int]:
    """Keep 4-bit layers dequantized for a while, so that no step pays for it; yield the bytes.

    The numbers are those that a step would compute, so results are the same. The quantized layers,
    at any depth of ``modules``, are put back at the end as they were.
    """
    places = [
        (parent, name, child)
        for module in modules
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, Linear4bit)
    ]
    size = 0
    try:
        for parent, name, child in places:
            stored: Any = child.weight
            weight = dequantize_4bit(stored.data, stored.quant_state).to(dtype)
            layer = nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            if child.bias is not None:
                layer.bias = nn.Parameter(child.bias.data.to(dtype), requires_grad=False)
            parent._modules[name] = layer.train(child.training)
            size += weight.numel() * weight.element_size()
        yield size
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def count_as_stored(module: Linear4bit) -> None:
    """Give an empty layer the packed shape, by which PEFT counts parameters."""
    module.weight = _absent(-(-module.weight.numel() // 2))


class _Absent(Params4bit):
    """Packed weights on the meta device, which bitsandbytes (0.50.2) neither copies nor pickles."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return memo.setdefault(id(self), _absent(self.shape[0]))

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return _absent, (self.shape[0],)


_Absent.__name__ = Params4bit.__name__  # by which PEFT knows that a byte holds two weights


def _absent(num_bytes: int) -> Any:
    packed = torch.empty(num_bytes, 1, dtype=torch.uint8, device="meta")
    return _Absent(packed, requires_grad=False, bnb_quantized=True)


def is_quantized(parameter: nn.Parameter) -> bool:
    """Return whether a parameter holds 4- or 8-bit integers, which take no gradient."""
    return isinstance(parameter, Params4bit | Int8Params)


def cast_unquantized(base: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a quantized checkpoint left unquantized, which transformers keeps as it was."""
    for parameter in base.parameters():
        if parameter.is_meta:
            continue
        if isinstance(parameter, Params4bit):
            parameter.quant_state.dtype = dtype  # what it is dequantized to in the backward pass
        elif parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def warn_of_unquantized_weights(base: PreTrainedModel, storage: str) -> None:
    """Warn of matrices that bitsandbytes leaves alone, such as fused experts: memory is as before.

    Embeddings are left alone on purpose, and so is what lies outside the backbone (the head).
    """
    names = [
        f"{module_name}.{name}"
        for module_name, module in base.base_model.named_modules()
        if not isinstance(module, nn.Embedding)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and not is_quantized(parameter)
    ]
    if names:
        warnings.warn(
            f"{len(names)} weights cannot be stored as {storage} and keep full size: "
            f"{', '.join(names[:3])}{', ...' if names[3:] else ''}",
            stacklevel=3,
        )
