"""Modules of the user's own, which add interventions, methods and tasks: ``--import NAME,...``.

Their names stand in an environment variable from then on, so that the processes of a comparison
import them too.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lowmem_reft.errors import InputError
from lowmem_reft.options import complaint

VARIABLE = "LOWMEM_REFT_IMPORT"
"""Names with commas between them."""

_FLAG = "--import"


def take(arguments: Sequence[str]) -> list[str]:
    """Import what ``--import`` names, and return the other arguments.

    Raises:
        InputError: No name follows, or a module cannot be imported.
    """
    rest, names = complaint.without_flag(arguments, _FLAG)
    if "" in names:
        raise InputError("import must be followed by a module's name, got none; for example my_own")
    if names:
        os.environ[VARIABLE] = ",".join(names)
    load()
    return rest


def load() -> None:
    """Import the modules that the environment names; the current directory is looked through too.

    Raises:
        InputError: One cannot be imported.
    """
    for name in _names():
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"import must name a module that can be imported from here, got {name!r} "
                f"({type(error).__name__}: {error}); check the name and the module"
            ) from error


def digests() -> dict[str, str]:
    """Return the SHA-256 of each module's file: what it adds is a part of what is trained."""
    found = {}
    for name in _names():
        file = getattr(sys.modules.get(name), "__file__", None)
        found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    return found


def _names() -> list[str]:
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
