"""Cards by name: memory, compute capability, bandwidth and arithmetic.

Memory is given twice: the total that ``nvidia-smi`` shows, a little less than what the box says
where error correction keeps some, and what torch has of it on Linux, where the driver keeps a part
too: the "total capacity" of torch's out-of-memory messages, the least in public reports of the
card. Where we know of none, the driver is taken to keep `DRIVER_BYTES` and `DRIVER_SHARE`, which is
no less than in any report but the T4's, which is given. On Windows torch has all of it, and the
desktop takes some. Bandwidth and arithmetic are the vendor's: data sheets, the
Turing, Ampere, Ada and Blackwell architecture papers, and for laptop cards four operations per
core and cycle at the highest clock the vendor names (what a laptop's power limit leaves is less).
Where a card is made in several forms the figures are those of the SXM module.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from lowmem_reft.errors import InputError

CONTEXT_BYTES = 2**29
"""Context of the driver, code of the kernels and handles of the libraries, which no allocator
counts: half a GiB, assumed and not measured. PyTorch's maintainers give about 400 MB where kernels
are loaded on first use, the default since CUDA 11.7 (pytorch/pytorch, issue 109888); cuBLAS and
bitsandbytes come on top."""

DRIVER_BYTES = 164 * 2**20
"""What the driver keeps of any card, before a context is made."""

DRIVER_SHARE = 0.014
"""What it keeps of the memory besides."""

FRAGMENTATION = 0.02
"""Share of the peak that torch's caching allocator reserves and cannot use: assumed, for
``PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True``, with which what is lost is the unused end of
one growing segment instead of a gap in each of many."""


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    """For people, with the gigabytes of the box."""
    memory_mib: int
    """Total memory as ``nvidia-smi`` shows it, MiB."""
    compute_capability: tuple[int, int]
    """Major and minor."""
    bandwidth_gb_s: float
    """Memory bandwidth, GB/s (10^9 bytes)."""
    tflops_16bit: float
    """Products of 16-bit matrices on tensor cores with fp32 sums, without sparsity, TFLOPS."""
    torch_gib: float | None = None
    """Total memory as torch reports it on Linux, GiB; None: no report is known."""

    @property
    def torch_bytes(self) -> int:
        """Return what torch has of the memory on Linux."""
        if self.torch_gib is not None:
            return round(self.torch_gib * 2**30)
        return round(self.memory_mib * 2**20 * (1 - DRIVER_SHARE)) - DRIVER_BYTES

    @property
    def has_bf16(self) -> bool:
        """Return whether it computes in bf16 (and so has flash attention)."""
        return self.compute_capability >= (8, 0)


GPUS: dict[str, Gpu] = {
    "t4": Gpu("T4 16 GB", 15360, (7, 5), 320, 65, 14.56),
    "v100-16": Gpu("V100 16 GB", 16384, (7, 0), 900, 125),
    "v100-32": Gpu("V100 32 GB", 32768, (7, 0), 900, 125),
    "a10": Gpu("A10 24 GB", 23028, (8, 6), 600, 125),
    "a10g": Gpu("A10G 24 GB", 23028, (8, 6), 600, 70),
    "a40": Gpu("A40 48 GB", 46068, (8, 6), 696, 149.7),
    "a100-40": Gpu("A100 40 GB", 40960, (8, 0), 1555, 312, 39.5),
    "a100-80": Gpu("A100 80 GB", 81920, (8, 0), 2039, 312, 79.25),
    "h100": Gpu("H100 80 GB", 81559, (9, 0), 3350, 989),
    "h100-nvl": Gpu("H100 NVL 94 GB", 95830, (9, 0), 3900, 835),
    "h200": Gpu("H200 141 GB", 143771, (9, 0), 4800, 989),
    "l4": Gpu("L4 24 GB", 23034, (8, 9), 300, 121),
    "l40s": Gpu("L40S 48 GB", 46068, (8, 9), 864, 362),
    "a6000": Gpu("RTX A6000 48 GB", 49140, (8, 6), 768, 154.8),
    "rtx6000-ada": Gpu("RTX 6000 Ada 48 GB", 49140, (8, 9), 960, 364),
    "2080ti": Gpu("RTX 2080 Ti 11 GB", 11264, (7, 5), 616, 53.8, 10.76),
    "3050": Gpu("RTX 3050 8 GB", 8192, (8, 6), 224, 18.2),
    "3060": Gpu("RTX 3060 12 GB", 12288, (8, 6), 360, 25.5, 11.75),
    "3060ti": Gpu("RTX 3060 Ti 8 GB", 8192, (8, 6), 448, 32.4),
    "3070": Gpu("RTX 3070 8 GB", 8192, (8, 6), 448, 40.6, 7.78),
    "3080": Gpu("RTX 3080 10 GB", 10240, (8, 6), 760, 59.5, 9.78),
    "3080-12": Gpu("RTX 3080 12 GB", 12288, (8, 6), 912, 61.3),
    "3090": Gpu("RTX 3090 24 GB", 24576, (8, 6), 936, 71, 23.7),
    "4060": Gpu("RTX 4060 8 GB", 8188, (8, 9), 272, 30.2, 7.75),
    "4060ti": Gpu("RTX 4060 Ti 8 GB", 8188, (8, 9), 288, 44.1),
    "4060ti-16": Gpu("RTX 4060 Ti 16 GB", 16380, (8, 9), 288, 44.1),
    "4070": Gpu("RTX 4070 12 GB", 12282, (8, 9), 504, 58.3),
    "4070ti-super": Gpu("RTX 4070 Ti Super 16 GB", 16376, (8, 9), 672, 88.2),
    "4080": Gpu("RTX 4080 16 GB", 16376, (8, 9), 717, 97.5),
    "4090": Gpu("RTX 4090 24 GB", 24564, (8, 9), 1008, 165.2, 23.52),
    "5060ti-16": Gpu("RTX 5060 Ti 16 GB", 16311, (12, 0), 448, 47.4),
    "5070": Gpu("RTX 5070 12 GB", 12227, (12, 0), 672, 61.7),
    "5070ti": Gpu("RTX 5070 Ti 16 GB", 16303, (12, 0), 896, 87.9),
    "5080": Gpu("RTX 5080 16 GB", 16303, (12, 0), 960, 112.6),
    "5090": Gpu("RTX 5090 32 GB", 32607, (12, 0), 1792, 209.5, 31.37),
    "3050-laptop": Gpu("RTX 3050 Laptop 4 GB", 4096, (8, 6), 192, 14.3),
    "3060-laptop": Gpu("RTX 3060 Laptop 6 GB", 6144, (8, 6), 336, 26.2, 5.8),
    "3070-laptop": Gpu("RTX 3070 Laptop 8 GB", 8192, (8, 6), 448, 33.2),
    "4060-laptop": Gpu("RTX 4060 Laptop 8 GB", 8188, (8, 9), 256, 29.1, 7.75),
    "4070-laptop": Gpu("RTX 4070 Laptop 8 GB", 8188, (8, 9), 256, 40.1),
    "4080-laptop": Gpu("RTX 4080 Laptop 12 GB", 12282, (8, 9), 432, 67.8),
    "4090-laptop": Gpu("RTX 4090 Laptop 16 GB", 16376, (8, 9), 576, 79.4),
}
"""Cards by the name that people type."""

_BRAND = re.compile(r"nvidia|geforce|tesla|rtx|gpu|graphics card|generation")
_FORM = re.compile(r"sxm\d?|pcie|hbm\d?e?")


def find_gpu(name: str) -> Gpu:
    """Return the card of a name such as ``a10``, ``RTX 4090`` or ``NVIDIA A100-SXM4-80GB``.

    Case, punctuation, the brand, the form (SXM, PCIe) and the unit GB do not matter. All else does:
    an H100 with "NVL" or a 3060 with "8 GB" is another card.

    Raises:
        InputError: The card is not in the catalogue; the message lists the nearest.
    """
    known = {_plain(key): gpu for key, gpu in GPUS.items()}
    known |= {_plain(gpu.name): gpu for gpu in GPUS.values()}
    found = known.get(_plain(name))
    if found is not None:
        return found
    raise InputError(
        f"gpu must be a card that is known, got {name!r}; choose one such as "
        f"{', '.join(_nearest(name))}, or give the card's memory with --memory-gib"
    )


def _nearest(name: str, count: int = 5) -> list[str]:
    """Return the keys that a name may have meant: those that begin like it first."""
    wanted = _plain(name)
    keys = {_plain(key): key for key in GPUS}
    near = [plain for plain in keys if wanted and plain.startswith(wanted)]
    near += difflib.get_close_matches(wanted, keys, n=count, cutoff=0.5)
    found = [keys[plain] for plain in dict.fromkeys(near)][:count]
    return found or ["t4", "a10", "a100-40", "3060", "4090"]


def _plain(name: str) -> str:
    """Return a name without case, brand, form, punctuation and "GB"."""
    text = _FORM.sub(" ", _BRAND.sub(" ", name.lower()))
    text = re.sub(r"(?<=\d)[\s_-]*gi?b\b", " ", text)
    return re.sub(r"[^a-z0-9]", "", text)
