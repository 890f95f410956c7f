"""What the meta device does not show: the kernels that the real device will run.

On the meta device attention falls back to its mathematical definition with a [seq, seq] matrix, and
quantized products are one opaque operator. Here each is replaced by what the CPU or a CUDA card
runs, so that outputs, what is kept for the backward pass and intermediate buffers come out right.

To teach the prediction a new kernel: write a function of the operator's arguments that allocates
what the kernel allocates, and enter it in ``_SUBSTITUTES``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.autograd import _functions
from bitsandbytes.nn.modules import Int8Params, Params4bit
from torch import Tensor

from lowmem_reft.machine.devices import has_real_bf16

BF16_PRODUCT_BYTES = 2**18
"""Scratch per thread of a bf16 matrix product on a CPU (oneDNN; measured: up to 0.19 MiB)."""

_FEW_ROWS, _MOST_INNER = 256, 1024

_PRODUCTS = ("aten::mm", "aten::bmm", "aten::linear", "aten::addmm")

_POINTWISE = ("aten::add", "aten::sub", "aten::mul", "aten::div")

_IN_FULL_PRECISION = ("aten::scatter", "aten::scatter_add", "aten::scatter_reduce", "aten::mean")

_get_rng_state = torch.get_rng_state

FLASH, EFFICIENT, MATH = "flash", "efficient", "math"


@dataclass(frozen=True)
class Kernels:
    """The kernels of one kind of device."""

    device_type: str
    """``cpu`` or ``cuda``."""
    bf16: bool = True
    """Whether a CUDA card computes in bf16 and has flash attention (compute capability >= 8)."""
    padded: bool = False
    """Whether some token of the batch is padding: models look at the values of the mask."""

    @property
    def allocation_bytes(self) -> int:
        """Sizes are rounded up to multiples of this by the device's allocator."""
        return 512 if self.device_type == "cuda" else 1

    def substitute(self, operator: Any) -> Callable[..., Any] | None:
        """Return what stands for ``operator`` on the meta device; None for the operator itself."""
        if operator._schema.name == "aten::_local_scalar_dense":
            return self._read_value
        if operator is torch.ops.aten.scatter.src and _in_backward():
            # Of a maximum's gradient: in place, but where a mode as ours looks on.
            return torch.ops.aten.scatter_.src
        return _SUBSTITUTES.get(operator._schema.name)

    def workspace_bytes(self, operator: Any, args: Any) -> int:
        """Return what the kernel of an operator allocates for itself while it runs."""
        name = operator._schema.name
        if self.device_type == "cpu" and name in _PRODUCTS and args[-1].dtype == torch.bfloat16:
            return _bf16_product_bytes(name, args)
        if self.device_type == "cpu" and name.rstrip("_") in _POINTWISE:
            return _promoted_bytes(args, in_place=name.endswith("_"))
        if name == "aten::_safe_softmax":  # which scores are of a masked token
            return int(args[0].numel())
        if self.device_type == "cpu" and name.rstrip("_") in _IN_FULL_PRECISION:
            # Sums are made in a copy in fp32 where the numbers are in 16 bit.
            is_half = args[0].dtype in (torch.float16, torch.bfloat16)
            return 4 * args[0].numel() if is_half else 0
        if "_scaled_dot_product_" not in name or name.endswith("_math"):
            return 0
        backward = name.endswith("_backward")
        query, key = (args[1], args[2]) if backward else (args[0], args[1])
        if self.device_type == "cpu":
            return _cpu_flash_workspace(query, backward=backward)
        if not backward:
            return 0
        # Sums of the gradients of queries, and the row sums of their products: fp32.
        total = 4 * query.numel() + 4 * query[..., 0].numel()
        if "flash" in name and query.shape[1] != key.shape[1]:
            # Grouped heads: gradients of keys and values per query head, before they are summed.
            total += 2 * query.element_size() * query.numel() // query.shape[2] * key.shape[2]
        elif "efficient" in name and query.shape[-1] > 128:
            total += 2 * 4 * key.numel()
        return int(total)

    def _read_value(self, tensor: Tensor) -> Any:
        """Answer the one question that models ask of a tensor's values: is all of it attended?"""
        return not self.padded if tensor.is_meta else tensor.item()

    @contextmanager
    def imitated(self) -> Iterator[None]:
        """Let models on the meta device take the paths that they take on this device."""
        with ExitStack() as stack:
            # Not a TorchFunctionMode: that is off while the backward pass recomputes.
            functional = torch.nn.functional
            plain = functional.scaled_dot_product_attention

            def attend(query: Tensor, *args: Any, **options: Any) -> Tensor:
                if query.is_meta:
                    return _attend(self, query, *args, **options)
                return plain(query, *args, **options)

            stack.enter_context(patch.object(functional, "scaled_dot_product_attention", attend))
            if self.device_type == "cpu":
                # bitsandbytes asks for the tensor's device: on a CPU it trains by dequantizing.
                stack.enter_context(
                    patch.object(_functions, "MatMul8bitLt", _functions.MatMul8bitFp)
                )
                stack.enter_context(patch.object(torch, "get_rng_state", _counted_rng_state))
            yield

    def choose_attention(
        self, inputs: tuple[Tensor, ...], mask: Tensor | None, causal: bool, gqa: bool
    ) -> str:
        """Return the kernel that attention to queries, keys and values gets on this device."""
        query, _, value = inputs
        if self.device_type == "cpu":  # torch chooses alike for small tensors of the same heads
            heads = ((t.shape[1], t.shape[3], t.dtype) for t in inputs)
            small: Any = [torch.empty(1, n, 4, width, dtype=kind) for n, width, kind in heads]
            small_mask = None if mask is None else torch.ones(1, 1, 4, 4, dtype=torch.bool)
            choose: Any = torch._fused_sdp_choice
            choice = int(choose(*small, small_mask, 0.0, causal, enable_gqa=gqa))
            return {0: MATH, 1: FLASH, 2: EFFICIENT}.get(choice, MATH)
        sixteen_bit = query.dtype in (torch.float16, torch.bfloat16)
        flash = self.bf16 and sixteen_bit and mask is None and query.shape[-1] <= 256
        if flash and query.shape[-1] == value.shape[-1]:
            return FLASH
        return MATH if gqa else EFFICIENT


def _in_backward() -> bool:
    """Return whether a backward pass is running, and not the recomputation of a forward pass."""
    return torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled()


def num_quantized(layer: Any) -> int:
    """Return how many numbers of a layer are stored in 4 or 8 bits."""
    weight: Any = layer._parameters.get("weight")
    is_quantized = isinstance(weight, Params4bit | Int8Params)
    return layer.in_features * layer.out_features if is_quantized else 0


def _bf16_product_bytes(name: str, args: Any) -> int:
    """Return the scratch of a bf16 product on this CPU: oneDNN's, by how it multiplies.

    With AMX the right matrix is copied in the order of its tiles, a part at a time, and so is a
    left one that is transposed. How much depends on all sizes; this is the most that was measured
    (K from 32 to 128,256). A CPU that does not compute in bf16 sums in fp32 instead: 4 bytes for
    each number of the product; without AVX-512 that is not oneDNN's, and takes nothing.
    """
    if name == "aten::linear":
        left, columns = args[0], args[1].shape[0]
    else:
        left, right = args[1:3] if name == "aten::addmm" else args[:2]
        columns = right.shape[-1]
    rows = left.shape[:-1].numel() if name == "aten::linear" else left.shape[-2]
    capabilities = torch.cpu.get_capabilities()
    if not has_real_bf16(torch.device("cpu")):
        return int(4 * rows * columns) if capabilities.get("avx512_f", True) else 0
    if not capabilities.get("amx_bf16"):
        return torch.get_num_threads() * BF16_PRODUCT_BYTES

    inner, few = int(left.shape[-1]), rows <= _FEW_ROWS

    def tiles(count: int) -> int:
        most = 9 * 2**17 if inner <= _MOST_INNER else (2 if few else 3) * 2**20
        return min(2 * (inner + 63) * (count + 63), most)

    # Of few rows the columns are gone through one tile at a time.
    is_narrow = few and inner <= 2 * _MOST_INNER
    is_transposed = name == "aten::linear" or right.stride(-1) != 1
    copied = tiles(1 if is_narrow and is_transposed else int(columns))
    if left.stride(-1) != 1:
        copied += tiles(int(rows))
    return torch.get_num_threads() * (copied + 2**14)


def _promoted_bytes(args: Any, *, in_place: bool) -> int:
    """Return the copies that a pointwise operator on a CPU makes of operands of a smaller dtype.

    In place the result is one more, before it is cast to the dtype of the first operand.
    """
    tensors = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg.dim() > 0]
    if len(tensors) < 2 or tensors[0].dtype == tensors[1].dtype:
        return 0
    common = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    copies = [t.numel() for t in tensors if t.dtype != common]
    if in_place and tensors[0].dtype != common:
        copies.append(tensors[0].numel())
    return sum(copies) * common.itemsize


def _cpu_flash_workspace(query: Tensor, *, backward: bool) -> int:
    """Return the tiles that torch's CPU kernel holds per thread (FlashAttentionKernel.cpp)."""
    length, width = query.shape[2], query.shape[3]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    per_score = (4 if query.dtype == torch.float32 else 6) * (2 if backward else 1)
    return torch.get_num_threads() * rows * (512 * per_score + 4 * (width + 2))


def _attend(
    kernels: Kernels,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Do what torch's C++ ``scaled_dot_product_attention`` does, with the kernel of the device."""
    kernel = kernels.choose_attention((query, key, value), attn_mask, is_causal, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        additive = torch.zeros_like(attn_mask, dtype=query.dtype)
        attn_mask = additive.masked_fill_(attn_mask.logical_not(), float("-inf"))
    aten, options = torch.ops.aten, dict[str, Any](scale=scale)
    how: tuple[Any, ...] = (dropout_p, is_causal)
    if kernel == MATH:
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        run, how = aten._scaled_dot_product_attention_math, (attn_mask, *how)
    elif kernels.device_type == "cpu":
        run, options["attn_mask"] = aten._scaled_dot_product_flash_attention_for_cpu, attn_mask
    elif kernel == FLASH:
        run = aten._scaled_dot_product_flash_attention
    else:
        needs_grad = query.requires_grad or key.requires_grad or value.requires_grad
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        run = aten._scaled_dot_product_efficient_attention
        how = (attn_mask, needs_grad, *how)
    out: Tensor = run(query, key, value, *how, **options)[0]
    return out


def _gemm_4bit(
    inputs: Tensor,
    weight: Tensor,
    shape: Any,
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    *of_absmax: Tensor,
) -> Tensor:
    """Dequantize the whole weight, then multiply: what bitsandbytes does beyond a few rows."""
    bnb = torch.ops.bitsandbytes
    if absmax_8bit is not None:
        code, offset = of_absmax
        scales = bnb.dequantize_blockwise(absmax_8bit, absmax, code, 256, torch.float32)
        absmax = scales + offset  # the scales stay until the product is there
    full = bnb.dequantize_4bit(weight, absmax, blocksize, quant_type, shape, inputs.dtype)
    return torch.nn.functional.linear(inputs, full, bias)


def _int8_vectorwise_quant(inputs: Tensor, threshold: float = 0.0) -> tuple[Any, ...]:
    """Quantize rows; which columns hold outliers depends on the values: none is assumed."""
    rows = inputs.numel() // inputs.shape[-1]
    return (
        torch.empty_like(inputs, dtype=torch.int8),
        torch.empty(rows, dtype=torch.float32, device=inputs.device),
        torch.empty(0, dtype=torch.int64, device=inputs.device) if threshold else None,
    )


def _int8_mixed_scaled_mm(
    inputs: Tensor, quantized: Tensor, weight: Tensor, *_scales_outliers_and_bias: Any
) -> tuple[Tensor, Tensor]:
    """Multiply in int8 with an int32 result, then scale."""
    shape = (*quantized.shape[:-1], weight.shape[0])
    product = torch.empty(shape, dtype=torch.int32, device=inputs.device)
    out = torch.empty(shape, dtype=torch.float16, device=inputs.device)
    del product
    return out.to(inputs.dtype), torch.empty(0, dtype=inputs.dtype, device=inputs.device)


def _grouped_mm(
    inputs: Tensor,
    weights: Tensor,
    _offsets: Tensor | None = None,
    _bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply the tokens of each expert with its weights, in any dtype: the meta device has bf16.

    Rows begin at multiples of 16 bytes.
    """
    num_groups = () if inputs.ndim + weights.ndim == 5 else (weights.shape[0],)
    if inputs.ndim == weights.ndim == 2:  # the gradient of the weights: one product per expert
        assert _offsets is not None
        num_groups = (_offsets.shape[0],)
    dtype = out_dtype or inputs.dtype
    unit = 16 // dtype.itemsize
    width = -(-weights.shape[-1] // unit) * unit
    out = torch.empty((*num_groups, inputs.shape[-2], width), dtype=dtype, device=inputs.device)
    return out[..., : weights.shape[-1]]


_SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "aten::_grouped_mm": _grouped_mm,
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "bitsandbytes::int8_vectorwise_quant": _int8_vectorwise_quant,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
}


def _counted_rng_state() -> Tensor:
    """Return the state that each checkpoint keeps, with as many bytes on the meta device."""
    state = _get_rng_state()
    state.counted = torch.empty(state.numel(), dtype=torch.uint8, device="meta")  # type: ignore[attr-defined]
    return state
