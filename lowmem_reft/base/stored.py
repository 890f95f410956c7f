"""What files of weights say of themselves, and what to say of one that is not whole.

Only headers are read: names, dtypes and shapes. A file that was cut, never downloaded (a pointer of
git-LFS is in its place) or is something else is told from them at once, before a model is built.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import parse_json

logger = logging.getLogger(__name__)

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_POINTER = b"version https://git-lfs"


class Stored(NamedTuple):
    """A tensor in a file."""

    dtype: str
    """As safetensors calls it: F32, BF16, U8, ..."""
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a safetensors file by name.

    Raises:
        InputError: It is not there, or not whole.
    """
    try:
        with safe_open(path, framework="pt", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: Stored(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise not_whole(path, "a whole file of safetensors", error) from error


def not_whole(path: Path, wanted: str, error: Exception) -> InputError:
    """Return what to say of a file that could not be read as what it should be.

    Args:
        path: The file.
        wanted: What it should be, with an article.
        error: What reading it raised.
    """
    advice = "download it again"
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
        if not start:
            found = "an empty file"
        elif start == _POINTER:
            found = "a pointer of git-LFS, which stands for a file that was never downloaded"
            advice = "download it again, or run git lfs pull there"
        else:
            said = str(error).strip() or type(error).__name__
            found = f"one that is cut or damaged ({said.splitlines()[0]})"
    except OSError as unreadable:
        found = f"what cannot be read ({unreadable.strerror or unreadable})"
    return InputError(f"{path} must be {wanted}, got {found}; {advice}")


def is_pointer(path: Path) -> bool:
    """Return whether git-LFS has left a pointer where a file should be."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def in_one_line(error: Exception) -> str:
    """Return what an error says, its kind first where that is no sentence."""
    said = " ".join(str(error).split())
    kind = "" if isinstance(error, OSError | ValueError) and said else f"{type(error).__name__}: "
    return f"{kind}{said}"[:300].removesuffix(": ")


def read_json_object(path: Path, wanted: str = "a JSON object") -> dict[str, object]:
    """Read a file that holds a JSON object, which ``wanted`` calls by its name.

    Raises:
        InputError: It holds something else, or cannot be read.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise not_whole(path, wanted, error) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} must be {wanted}, got {type(content).__name__}; download it again"
        )
    return content


def read_index(path: Path) -> dict[str, str]:
    """Return which file each tensor of a checkpoint is in, as its index says.

    Raises:
        InputError: It is none.
    """
    files = read_json_object(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise InputError(
            f"{path} must have a weight_map with the file of each tensor, got {files!r}; download "
            "it again"
        )
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(
                f"{path} must name a file beside it for {name}, got {file!r}; download it again"
            )
    return files


def check_checkpoint(directory: Path) -> dict[str, Stored]:
    """Return the tensors that are loaded from a directory; none if there are no safetensors.

    Raises:
        InputError: A file is missing or not whole, or the index and the files are at odds.
    """
    whole, index = directory / WHOLE, directory / INDEX
    if whole.exists():
        stored = read_header(whole)
        if index.exists():
            _check_beside(index, stored)
        return stored
    return _check_sharded(index) if index.exists() else {}


def _check_beside(index: Path, stored: dict[str, Stored]) -> None:
    """Say that an index is not gone by, where all is in one file; refuse one of other tensors."""
    named = read_index(index)
    if set(named) != set(stored):
        raise InputError(
            f"{index} must name the tensors of {WHOLE}, the file that is loaded where there is "
            "one, got those of another checkpoint; remove what is old"
        )
    if {*named.values()} != {WHOLE}:
        logger.warning(f"{index.parent / WHOLE} is loaded, and not the files that {index} names")


def _check_sharded(index: Path) -> dict[str, Stored]:
    """Return the tensors of the files that an index names, which must be those it names."""
    named, stored = read_index(index), {}
    for file in sorted(set(named.values())):
        path = index.parent / file
        if not path.exists():
            raise InputError(
                f"{path} must be there, as {index.name} names it, got no such file; download it "
                "again"
            )
        held = read_header(path)
        wanted = {name for name, where in named.items() if where == file}
        for names, what in ((wanted - set(held), "lacks"), (set(held) - wanted, "holds")):
            if names:
                raise InputError(
                    f"{index} must say where each tensor is, got another content of {file}, which "
                    f"{what} {some(names)}; download both again"
                )
        stored.update(held)
    return stored


def are_finite(tensor: Tensor) -> bool:
    """Return whether no number is NaN or infinite, in one pass that makes no copy."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # of 8 bit, of which there is no minimum
        tensor = tensor.float()
    low, high = torch.aminmax(tensor.detach())  # both are NaN where one number is
    return bool(low.isfinite() & high.isfinite())


def not_finite(files: Iterable[Path]) -> tuple[Path, str] | None:
    """Return the first tensor that holds NaN or infinity, and its file; this reads them whole."""
    for path in files:
        with safe_open(path, framework="pt", backend="pread") as file:
            for name in file.keys():  # noqa: SIM118
                if not are_finite(file.get_tensor(name)):
                    return path, name
    return None


def some(names: Iterable[str]) -> str:
    """Return the first of some names, and how many more there are."""
    first, *others = sorted(names)
    return f"{first} and {len(others)} more" if others else first
