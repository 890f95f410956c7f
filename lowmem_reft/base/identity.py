"""Which base an adapter belongs to: how it is stored, and a digest of its checkpoint.

An adapter computes what it learned only on the base that it was trained on. The digest is that of
the tensors on the disk, so it is the same for every storage, compute dtype and device.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_reft.base.blocks import device_of, find_blocks
from lowmem_reft.base.hub import local_directory, weights_among
from lowmem_reft.machine.devices import DTYPES
from lowmem_reft.machine.files import parse_json

_NUM_SAMPLES = 8
_SAMPLE_BYTES = 1 << 12


def checkpoint_digest(model: str | Path, revision: str | None = "main") -> str | None:
    """SHA-256 over names, dtypes, shapes and samples of a checkpoint's tensors, as 16 hex digits.

    It does not depend on how the tensors are spread over files. Of each, at most 32 KiB are read,
    evenly spaced from its first byte to its last: a few MiB of a 7B model. A change that misses all
    of them, as of a single row of a large matrix, is not seen.

    Args:
        model: Hub id (of which only the local cache is looked at) or local directory.
        revision: Branch, tag or commit of a hub id. None: not known, which is no matter if there is
            only one in the cache.

    Returns:
        None if there are no safetensors that can be read (a checkpoint of ``.bin`` files has no
        digest), or if it is not known which revision is meant.
    """
    directory = local_directory(str(model), revision)
    try:
        files = [] if directory is None else _weight_files(directory)
        tensors = sorted(tensor for path in files for tensor in _tensors(path))
        return _digest(tensors) if tensors else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # loading it says what is wrong


def commit_of(model: str | Path, revision: str) -> str | None:
    """Return the commit of a hub id's revision in the local cache; None of a directory."""
    if Path(model).is_dir():
        return None
    directory = local_directory(str(model), revision)
    return None if directory is None else directory.name


def _weight_files(directory: Path) -> list[Path]:
    def find(name: str) -> Path | None:
        path = directory / name
        return path if path.is_file() else None

    found = weights_among(find)
    files = [path for path in found if path is not None]
    return files if len(files) == len(found) else []


def _tensors(path: Path) -> Iterator[tuple[str, str, Path, int, int]]:
    """Yield each tensor's name, its dtype and shape, and where in the file it starts and ends."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("not a safetensors file")
        header = parse_json(file.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, f"{entry['dtype']} {entry['shape']}", path, start, end


def _digest(tensors: list[tuple[str, str, Path, int, int]]) -> str:
    digest = hashlib.sha256()
    with ExitStack() as stack:
        # Unbuffered: a buffer would read ahead of every sample.
        opened = {
            path: stack.enter_context(path.open("rb", buffering=0))
            for path in dict.fromkeys(tensor[2] for tensor in tensors)
        }
        for name, kind, path, start, end in tensors:
            digest.update(f"{name} {kind}\n".encode())
            file, last = opened[path], max(start, end - _SAMPLE_BYTES)
            for index in range(_NUM_SAMPLES if last > start else 1):
                file.seek(start + index * (last - start) // (_NUM_SAMPLES - 1))
                digest.update(file.read(min(_SAMPLE_BYTES, end - start)))
    return digest.hexdigest()[:16]


def base_digest(model: nn.Module, exclude: Callable[[str], bool] | None = None) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers.

    Quantized bytes and their constants (absmax, code books) are included. The names that PEFT puts
    around a base are taken off: a base has one digest, alone or under an adapter that is excluded.

    ``exclude`` tells from a name, as in ``state_dict``, whether to leave a tensor out.
    """
    tensors = {**dict(model.named_buffers()), **model.state_dict()}
    digest = hashlib.sha256()
    for name in sorted(tensors, key=_name_in_base):
        if exclude is not None and exclude(name):
            continue
        tensor = tensors[name].detach()
        if tensor.is_meta:  # of a block that is not resident: the checkpoint has a digest
            continue
        digest.update(f"{_name_in_base(name)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _name_in_base(name: str) -> str:
    return re.sub(r"\.(base_layer|original_module)\.", ".", name.removeprefix("base_model.model."))


def storage_of(model: nn.Module) -> str | None:
    """How the blocks of a loaded base are stored: nf4, fp4, int8, bf16, fp16 or fp32."""
    block = find_blocks(model)[1][-1]  # lower ones may be elsewhere, stored as nothing yet
    for module in block.modules():
        kind = type(module).__name__
        if kind == "Linear4bit":
            return str(getattr(module.weight, "quant_type", None) or "nf4")
        if kind == "Linear8bitLt":
            return "int8"
    held = next((p.dtype for p in block.parameters() if p.dim() > 1), None)
    return next((name for name, dtype in DTYPES.items() if dtype == held), None)


def note_base(config: Any, model: nn.Module) -> None:
    """Write into an adapter's configuration what it is trained on; compare a loaded one's.

    An adapter that is loaded to be used keeps the base of its training. One that is made, or that
    is trained further, is from now on of the base that it is put on; if it was of one of another
    name, which ``get_peft_model`` has replaced by then, there is a warning.

    Args:
        config: A ``ReftConfig`` or ``LoraReftConfig``.
        model: The base that the adapter is put on.
    """
    if device_of(model).type == "meta":  # a prediction
        return
    name = getattr(model, "name_or_path", None) or None
    commit = getattr(getattr(model, "config", None), "_commit_hash", None)
    here = name, storage_of(model), checkpoint_digest(name or "", commit)
    trained = config.base_model_name_or_path, config.base_storage, config.base_digest
    if config.inference_mode or trained[0] not in (None, name):
        said = other_base(trained, here)
        if said:
            warnings.warn(said, stacklevel=2)
    if not config.inference_mode:
        config.base_model_name_or_path = name or trained[0]
    if not config.inference_mode or trained[1:] == (None, None):
        config.base_storage, config.base_digest = here[1:]


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
