"""Which device and which arithmetic the base uses."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from lowmem_reft.errors import InputError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The project's names of the floating-point dtypes."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the project's name of a dtype."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Turn cpu, cuda, cuda:N, auto or None into a device that exists; a CUDA device gets an index.

    auto and None are CUDA if there is any, else the CPU. Without an index CUDA means the device of
    this process under a distributed launcher (``LOCAL_RANK``), else the first.

    Raises:
        InputError: Not a CPU or CUDA device, or not on this machine.
    """
    if device is None or device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = str(device).partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda" or not (number.isdecimal() or str(device) == "cuda"):
        raise InputError(f"device must be auto, cpu, cuda or cuda:N, got {str(device)!r}; use auto")
    if not torch.cuda.is_available():
        raise InputError(
            f"device must be one that torch can use, got {str(device)!r}; use cpu, or install a "
            "driver and a CUDA build of torch (torch.cuda.is_available() is False)"
        )
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise InputError(
            f"device must be one of {torch.cuda.device_count()} CUDA devices (counted from 0), "
            f"got {str(device)!r}; use a lower number"
        )
    return torch.device("cuda", index)


def resolve_compute_dtype(
    compute_dtype: str | torch.dtype | None, device: str | torch.device | None = None
) -> torch.dtype:
    """Resolve the dtype of the base's arithmetic.

    auto and None are bf16 where the hardware computes in it, else fp32. fp16 is never chosen: its
    range overflows in some bases (https://github.com/artidoro/qlora/issues/71).

    Raises:
        InputError: An unknown dtype, or fp16 on a CPU.
    """
    target = resolve_device(device)
    if compute_dtype is None or compute_dtype == "auto":
        return torch.bfloat16 if has_real_bf16(target) else torch.float32
    dtype = DTYPES.get(compute_dtype) if isinstance(compute_dtype, str) else compute_dtype
    if dtype is None or dtype not in DTYPES.values():
        raise InputError(
            f"compute_dtype must be auto, bf16, fp16 or fp32, got {compute_dtype!r}; use auto"
        )
    if dtype == torch.float16:
        if target.type == "cpu":
            raise InputError(
                f"compute_dtype must be bf16 or fp32 on a CPU, got {compute_dtype!r}; use auto"
            )
        warnings.warn(
            "compute_dtype fp16 can overflow; use bf16 or fp32 if the loss is NaN", stacklevel=2
        )
    elif dtype == torch.bfloat16 and target.type == "cuda" and not has_real_bf16(target):
        warnings.warn(
            f"compute_dtype bf16 is emulated on {target}, and slow; use fp32", stacklevel=2
        )
    return dtype


def resolve_storage(
    storage: str | None,
    compute_dtype: str | torch.dtype | None,
    device: str | torch.device | None = None,
    *,
    default: str = "nf4",
    has_bf16: bool | None = None,
) -> tuple[Any, torch.dtype]:
    """Settle how a base is stored and what it computes in; all commands ask here.

    Unquantized weights are computed with as they are stored.

    Args:
        storage: nf4, fp4, int8, bf16, fp16 or fp32; None: not given.
        compute_dtype: See `resolve_compute_dtype`.
        device: Likewise.
        default: The storage where none is given: the method's own.
        has_bf16: Whether a card that is planned for, and need not be here, computes in bf16; None
            asks the device.

    Raises:
        InputError: They do not go together, or with the device.
    """
    storage = storage or default
    stored = DTYPES.get(storage)
    if has_bf16 is not None:
        known = {**DTYPES, "auto": torch.bfloat16 if has_bf16 else torch.float32}
        return storage, stored or known[str(compute_dtype)]
    target = resolve_device(device)
    if stored is None:
        return storage, resolve_compute_dtype(compute_dtype, target)
    if compute_dtype not in (None, "auto", storage, stored):
        raise InputError(
            f"compute_dtype must be auto or {storage} with storage {storage}, "
            f"got {compute_dtype!r}; unquantized weights are computed with as they are stored"
        )
    if storage == "fp16" and target.type == "cpu":
        raise InputError("storage must be bf16 or fp32 on a CPU, got 'fp16'; use bf16")
    return storage, resolve_compute_dtype(storage, target)


def has_real_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16; a T4 only emulates it and still says it supports it."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def return_freed_memory() -> None:
    """Give memory that the C library keeps for later back to the system (glibc; else nothing)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def seed_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Let what is drawn meanwhile on the host and a device leave their random numbers as they were.

    Other cards are not begun.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def synchronize(device: torch.device) -> None:
    """Wait for what a device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_cached(device: torch.device) -> None:
    """Give memory back that torch keeps for later on a device, and the C library on the host."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return_freed_memory()


def device_name(device: str = "auto") -> str:
    """What the run was measured on: CPU model and threads, or GPU name and memory in GiB.

    For example ``"Intel(R) Xeon(R) Processor, 2 threads"`` or ``"NVIDIA L4, 22.0 GiB"``.
    """
    resolved = resolve_device(device)
    if resolved.type == "cuda":
        properties = torch.cuda.get_device_properties(resolved)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    threads = torch.get_num_threads()
    return f"{_cpu_model()}, {threads} {'thread' if threads == 1 else 'threads'}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
