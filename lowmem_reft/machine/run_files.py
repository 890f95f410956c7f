"""The file of options that a run writes beside its result, and that ``--config`` reads again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowmem_reft.machine.destinations import check_file
from lowmem_reft.machine.files import plain, write_text_whole
from lowmem_reft.options import run_file, written

NAME = "run.yaml"

_BEGINS = "# lowmem-reft "
"""What tells it from a file of the user's."""


def check_run_file(directory: Path) -> None:
    """Refuse a directory whose ``run.yaml`` no run wrote: it would be replaced.

    Raises:
        InputError: It is one, or a link.
    """
    check_file("output_dir", directory / NAME, is_ours=_is_ours)


def write_run_file(directory: Path, command: str, options: Any, **resolved: Any) -> None:
    """Write what a run was given and what was resolved of it.

    Args:
        directory: Where its result goes.
        command: The command.
        options: Its options.
        resolved: Values by the names of options, in place of those given; None leaves one out.
    """
    import yaml

    content = {**written.values(options), **resolved}
    known = written.leaves(type(options))
    content = {
        name: plain(list(value) if isinstance(value, tuple) else value)
        for name, value in content.items()
        if value is not None and not known[name].positional
    }
    said = f"{_BEGINS}{command} --config {NAME} runs this again; flags override it.\n"
    text = yaml.safe_dump(
        {run_file.COMMAND: command, **content}, sort_keys=False, allow_unicode=True, width=1000
    )
    write_text_whole(directory / NAME, said + text)


def _is_ours(path: Path) -> bool:
    try:
        return path.read_text(encoding="utf-8").startswith(_BEGINS)
    except (OSError, UnicodeDecodeError):
        return False
