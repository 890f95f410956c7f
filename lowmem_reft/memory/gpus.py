"""Cards by name: memory, compute capability, bandwidth and arithmetic.

Figures are the vendor's data sheets (bandwidth, dense 16-bit tensor-core arithmetic) and the total
that ``nvidia-smi`` shows (memory), which is what a driver lets programs share.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lowmem_reft.errors import InputError

CONTEXT_BYTES = 2**29
"""Driver context, kernels and library handles, which no allocator counts: half a GiB, about what
CUDA 12 takes on cards since Ampere once torch, cuBLAS and bitsandbytes are loaded."""

FRAGMENTATION = 0.02
"""Share of the peak that torch's caching allocator holds and cannot use: an assumption, for
``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``; without it gaps can be
several times larger."""


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    """For people."""
    memory_mib: int
    """Total memory, MiB."""
    compute_capability: tuple[int, int]
    """Major and minor."""
    bandwidth_gb_s: float
    """Memory bandwidth, GB/s."""
    tflops_16bit: float
    """Dense bf16 or fp16 products with fp32 sums, TFLOPS."""

    @property
    def has_bf16(self) -> bool:
        """Return whether it computes in bf16 (and so has flash attention)."""
        return self.compute_capability >= (8, 0)


GPUS: dict[str, Gpu] = {
    "3050": Gpu("RTX 3050 8 GB", 8192, (8, 6), 224, 18),
    "3050-laptop": Gpu("RTX 3050 Laptop 4 GB", 4096, (8, 6), 192, 15),
    "3060": Gpu("RTX 3060 12 GB", 12288, (8, 6), 360, 25),
    "3060-laptop": Gpu("RTX 3060 Laptop 6 GB", 6144, (8, 6), 336, 22),
    "3060ti": Gpu("RTX 3060 Ti 8 GB", 8192, (8, 6), 448, 32),
    "3070": Gpu("RTX 3070 8 GB", 8192, (8, 6), 448, 41),
    "3070-laptop": Gpu("RTX 3070 Laptop 8 GB", 8192, (8, 6), 448, 33),
    "3080": Gpu("RTX 3080 10 GB", 10240, (8, 6), 760, 60),
    "3080-12": Gpu("RTX 3080 12 GB", 12288, (8, 6), 912, 61),
    "3090": Gpu("RTX 3090", 24576, (8, 6), 936, 71),
    "4060": Gpu("RTX 4060 8 GB", 8188, (8, 9), 272, 30),
    "4060-laptop": Gpu("RTX 4060 Laptop 8 GB", 8188, (8, 9), 256, 29),
    "4060ti-16": Gpu("RTX 4060 Ti 16 GB", 16380, (8, 9), 288, 44),
    "4070": Gpu("RTX 4070 12 GB", 12282, (8, 9), 504, 58),
    "4070-laptop": Gpu("RTX 4070 Laptop 8 GB", 8188, (8, 9), 256, 40),
    "4070ti-super": Gpu("RTX 4070 Ti Super 16 GB", 16376, (8, 9), 672, 88),
    "4080": Gpu("RTX 4080 16 GB", 16376, (8, 9), 717, 97),
    "4080-laptop": Gpu("RTX 4080 Laptop 12 GB", 12282, (8, 9), 432, 50),
    "4090": Gpu("RTX 4090", 24564, (8, 9), 1008, 165),
    "4090-laptop": Gpu("RTX 4090 Laptop 16 GB", 16376, (8, 9), 576, 65),
    "5070": Gpu("RTX 5070 12 GB", 12227, (12, 0), 672, 62),
    "5070ti": Gpu("RTX 5070 Ti 16 GB", 16303, (12, 0), 896, 88),
    "5080": Gpu("RTX 5080 16 GB", 16303, (12, 0), 960, 113),
    "5090": Gpu("RTX 5090 32 GB", 32607, (12, 0), 1792, 210),
    "2080ti": Gpu("RTX 2080 Ti 11 GB", 11264, (7, 5), 616, 54),
    "t4": Gpu("T4", 15360, (7, 5), 320, 65),
    "v100-16": Gpu("V100 16 GB", 16384, (7, 0), 900, 112),
    "v100-32": Gpu("V100 32 GB", 32768, (7, 0), 900, 112),
    "l4": Gpu("L4", 23034, (8, 9), 300, 121),
    "l40s": Gpu("L40S", 46068, (8, 9), 864, 362),
    "a10": Gpu("A10", 23028, (8, 6), 600, 125),
    "a10g": Gpu("A10G", 23028, (8, 6), 600, 70),
    "a40": Gpu("A40", 46068, (8, 6), 696, 150),
    "a6000": Gpu("RTX A6000", 49140, (8, 6), 768, 155),
    "rtx6000-ada": Gpu("RTX 6000 Ada", 49140, (8, 9), 960, 364),
    "a100-40": Gpu("A100 40 GB", 40960, (8, 0), 1555, 312),
    "a100-80": Gpu("A100 80 GB", 81920, (8, 0), 2039, 312),
    "h100": Gpu("H100 SXM 80 GB", 81559, (9, 0), 3352, 989),
    "h200": Gpu("H200", 143771, (9, 0), 4800, 989),
}
"""Cards by the name that people type."""

_NOISE = ("nvidia", "geforce", "tesla", "rtx", "gpu", "sxm4", "sxm5", "sxm2", "pcie", "gb")


def find_gpu(name: str) -> Gpu:
    """Return the card of a name such as ``a10``, ``RTX 4090`` or ``NVIDIA A100-SXM4-80GB``.

    Raises:
        InputError: the card is not in the catalogue; the message lists the nearest.
    """
    wanted = _plain(name)
    known = {_plain(key): gpu for key, gpu in GPUS.items()}
    known |= {_plain(gpu.name): gpu for gpu in GPUS.values()}
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(name.lower(), GPUS, n=4, cutoff=0.4) or list(GPUS)[:6]
    raise InputError(
        f"gpu must be a card that is known, such as {', '.join(near)}, got {name!r}; "
        "or give its memory with --memory-gib"
    )


def _plain(name: str) -> str:
    """Return a name without case, punctuation, the vendor's words and "GB"."""
    text = name.lower()
    for word in _NOISE:
        text = text.replace(word, " ")
    return re.sub(r"[^a-z0-9]", "", text)
