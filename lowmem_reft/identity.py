"""Which base an adapter belongs to: how it is stored, and a digest of its checkpoint.

An adapter computes what it learned only on the base that it was trained on. The digest is that of
the files, so it is the same for every storage, dtype and device.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_reft.blocks import device_of, find_blocks

if TYPE_CHECKING:
    from torch import nn

_NUM_SAMPLES = 32
_SAMPLE_BYTES = 1 << 14

_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def checkpoint_digest(model: str | Path) -> str | None:
    """SHA-256 over evenly spaced samples of a checkpoint's weights, as 16 hexadecimal digits.

    It reads half a MiB of each file, whatever its size; all of a file that is smaller.

    Args:
        model: Hub id (of which only the local cache is looked at) or local directory.

    Returns:
        None if there are no safetensors files.
    """
    directory = _directory(str(model))
    files = [] if directory is None else sorted(directory.glob("model*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for index in range(_NUM_SAMPLES):
                file.seek(index * size // _NUM_SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16] if files else None


def _directory(model: str) -> Path | None:
    if not model or Path(model).is_dir():
        return Path(model) if model else None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not a name of the hub at all
        return None


def storage_of(model: nn.Module) -> str | None:
    """How the blocks of a loaded base are stored: nf4, fp4, int8, bf16, fp16 or fp32."""
    block = find_blocks(model)[1][0]
    for module in block.modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            return str(getattr(module.weight, "quant_type", None) or "nf4")
        if kind == "Linear8bitLt":
            return "int8"
    dtypes = [str(p.dtype).removeprefix("torch.") for p in block.parameters() if p.dim() > 1]
    return _DTYPES.get(dtypes[0]) if dtypes else None


def note_base(config: Any, model: nn.Module) -> None:
    """Write into a new adapter's configuration what it is trained on; compare a loaded one's.

    Args:
        config: A ``ReftConfig``; one that was read from a file has the base of its training.
        model: The base that the adapter is put on.
    """
    if device_of(model).type == "meta":  # a prediction
        return
    storage = storage_of(model)
    digest = checkpoint_digest(getattr(model, "name_or_path", ""))
    if config.is_of_a_base:
        said = other_base(
            (config.base_model_name_or_path, config.base_storage, config.base_digest),
            (getattr(model, "name_or_path", None), storage, digest),
        )
        if said:
            warnings.warn(said, stacklevel=2)
    else:
        config.base_storage, config.base_digest = storage, digest


def other_base(
    trained: tuple[str | None, str | None, str | None],
    loaded: tuple[str | None, str | None, str | None],
) -> str | None:
    """Return what to say if an adapter is loaded on another base than it was trained on.

    Args:
        trained: Name, storage and digest of the base in training; None: not known.
        loaded: Those of the base at hand.
    """
    (name, storage, digest), (here, here_storage, here_digest) = trained, loaded
    differs = []
    if digest and here_digest and digest != here_digest:
        same = "another checkpoint of that name" if name == here else repr(here)
        differs.append(f"trained on {name!r} and is loaded on {same}")
    if storage and here_storage and storage != here_storage:
        differs.append(f"trained on a base stored as {storage} and is loaded on {here_storage}")
    if not differs:
        return None
    return f"the adapter was {', and '.join(differs)}; it may answer differently: measure it there"


OTHER_BASE = re.escape("the adapter was trained on")
"""How the warning starts."""
