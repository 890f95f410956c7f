"""Where a number comes from: versions, device, commit and digests, stored beside every result.

Importing this module loads no torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS = (
    "lowmem-reft",
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "accelerate",
    "datasets",
)
"""The packages whose version can change a result."""

_CHUNK_BYTES = 1 << 20


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that can change a result; None: not installed."""
    found = {name.replace("-", "_"): _version(name) for name in DISTRIBUTIONS}
    return {"python": platform.python_version(), **found}


def installed(name: str) -> str:
    """A distribution with its version, as messages name it, for example ``transformers 5.24.0``."""
    version = _version(name)
    return f"{name}, which is not installed" if version is None else f"{name} {version}"


def commit() -> str | None:
    """Commit of this package's checkout: ``<sha>``, or ``<sha>-dirty`` with changed files.

    None if the package is not under version control: an environment inside another project's
    checkout must not be mistaken for that project, hence the question whether this very file is
    tracked.
    """
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def directory_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the names and the bytes of all files below a directory (a model's files).

    Hidden files and folders (``.git``, ``.cache``) do not count; links are followed, as the loader
    does.

    Raises:
        NotADirectoryError: ``path`` is not a directory.
    """
    root = Path(path)
    if not root.is_dir():
        raise NotADirectoryError(str(root))
    digest = hashlib.sha256()
    files = {file.relative_to(root).as_posix(): file for file in root.rglob("*") if file.is_file()}
    for name in sorted(files):
        if not any(part.startswith(".") for part in name.split("/")):
            digest.update(f"{name}\0{file_digest(files[name])}\n".encode())
    return digest.hexdigest()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
