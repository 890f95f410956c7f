"""Options in a file: ``lowmem-reft COMMAND --config run.yaml``.

The file names options as the command line does, without the hyphens in front, one below the other;
there are no groups in it. YAML and TOML are read. A flag overrides what the file says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_origin

from lowmem_reft.errors import InputError
from lowmem_reft.options import complaint, written

COMMAND = "command"
"""The name under which a file may say what it is for."""

HELP = (
    "--config FILE takes options from a YAML or TOML file (names as below, without the hyphens in "
    "front); flags override it."
)

_FLAG = "--config"
_YES, _NO = ("true", "yes", "on"), ("false", "no", "off")
_SAID = ("true", "false")
_NOTHING = ("", "null", "~")


@dataclass(frozen=True)
class Entry:
    """One option in a file."""

    words: tuple[str, ...]
    """How it is written on a command line; empty: its default."""
    place: str
    """``file:line``."""


def take(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """Split ``--config FILE`` off a command's arguments.

    Raises:
        InputError: There is no file after it, or it stands there twice.
    """
    rest, files = complaint.without_flag(arguments, _FLAG)
    if len(files) > 1 or "" in files:
        raise InputError(
            f"config must be one YAML or TOML file, got {', '.join(map(repr, files))}; name one"
        )
    return rest, Path(files[0]) if files else None


def read(path: Path, command: str, kind: Any, *, given: Sequence[str] = ()) -> dict[str, Entry]:
    """Return the options of a file by their names.

    Args:
        path: YAML (``.yaml``, ``.yml``) or TOML (``.toml``).
        command: The command that is run.
        kind: Its class of options.
        given: Flags of the command line, which come before what the file says; ``--no-NAME`` takes
            back a switch that the file turns on.

    Raises:
        InputError: The file cannot be read, is for another command, or names what there is not. The
            message names file and line.
    """
    leaves = written.leaves(kind)
    own = written.own_names(leaves)
    content, lines = _content(path)
    found: dict[str, Entry] = {}
    for written_name, value in content.items():
        name = str(written_name).replace("-", "_")
        name = own.get(name, name)
        place = f"{path}:{lines.get(str(written_name), 1)}"
        if name == COMMAND:
            if value != command:
                raise InputError(
                    f"{place}: command must be {command}, got {value!r}; the file is for another "
                    "command"
                )
            continue
        if name in found:
            raise InputError(f"{place}: {name} must stand there once, got it again; leave one out")
        if name not in leaves:
            raise InputError(f"{place}: {complaint.no_option(name, command, leaves)}")
        if leaves[name].positional:
            raise InputError(
                f"{place}: {name} must be given on the command line of {command}, got it in a "
                "file; leave it out here"
            )
        if not {written.flag(name), *leaves[name].aliases, _off(name, leaves)} & {*given}:
            found[name] = Entry(_words(name, value, leaves[name].hint, place), place)
    return found


def without_usual_switches(arguments: Sequence[str], kind: Any) -> list[str]:
    """Return the arguments without each switch that says the default, nor what it takes back.

    It is ``--no-NAME`` but for what is on by default.
    """
    leaves, takes_back, left = written.leaves(kind), dict[str | None, str | None](), list[str]()
    for name, leaf in leaves.items():
        if leaf.hint is bool:
            flag, off = written.flag(name), _off(name, leaves)
            takes_back |= {flag: off} if leaf.usual else {off: flag}
    for word in arguments:
        if word and word in takes_back:
            left = [other for other in left if other != takes_back[word]]
        else:
            left.append(word)
    return left


def with_bare_switches(arguments: Sequence[str], kind: Any) -> list[str]:
    """Return the arguments with switches that are told true or false, as elsewhere, as ours.

    ``--NAME true`` becomes ``--NAME``, and ``--NAME false`` becomes ``--no-NAME``.
    """
    leaves = written.leaves(kind)
    switches = {
        flag: name
        for name, leaf in leaves.items()
        if leaf.hint is bool
        for flag in (written.flag(name), *leaf.aliases)
    }
    words: list[str] = []
    left = list(arguments)
    while left:
        word = left.pop(0)
        flag, equals, value = word.partition("=")
        name = switches.get(flag.replace("_", "-"))
        if name and not equals and left and left[0].lower() in _SAID:
            value = left.pop(0)
        if name and value.lower() in _SAID:
            word = written.switch(name, value.lower() == "true")
        words.append(word)
    return words


def blamed(message: str, entries: Mapping[str, Entry]) -> str:
    """Put file and line before a message that is about an option of a file."""
    first = message.partition(" ")[0]
    flags = [name for name in entries if re.search(rf"{written.flag(name)}(?![\w-])", message)]
    for name in [first, *flags]:
        if name in entries:
            return f"{entries[name].place}: {message}"
    return message


def _off(name: str, leaves: Mapping[str, written.Leaf]) -> str | None:
    """Return ``--no-NAME`` of a switch, unless that is an option itself."""
    is_free = leaves[name].hint is bool and f"no_{name}" not in leaves
    return written.switch(name, False) if is_free else None


def _words(name: str, value: Any, hint: Any, place: str) -> tuple[str, ...]:
    """Return how a value is written on a command line."""
    if isinstance(value, dict):
        raise InputError(
            f"{place}: {name} must be a value, got a group of them; write its options without a "
            "group"
        )
    if isinstance(value, list):
        texts = [str(item) for item in value]
        if not texts:
            return ()
        several = get_origin(hint) is tuple
        return (written.flag(name), *texts) if several else (written.flag(name), ",".join(texts))
    text = str(value)
    if hint is bool:
        if text.lower() not in _YES + _NO:
            raise InputError(f"{place}: {name} must be true or false, got {text!r}; write one")
        return (written.switch(name, text.lower() in _YES),)
    return () if text.lower() in _NOTHING else (f"{written.flag(name)}={text}",)


def _content(path: Path) -> tuple[dict[Any, Any], dict[str, int]]:
    """Return what a file holds, values as texts, and the lines of its names."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"config must be a file that can be read, got {str(path)!r} ({error}); check the path"
        ) from error
    if path.suffix in (".yaml", ".yml"):
        return _yaml(path, text)
    if path.suffix == ".toml":
        return _toml(path, text)
    raise InputError(
        f"config must end in .yaml, .yml or .toml, got {str(path)!r}; name its format by its end"
    )


def _yaml(path: Path, text: str) -> tuple[dict[Any, Any], dict[str, int]]:
    import yaml

    # Every value stays a text: 1e-3 is no number in YAML, and on and off are switches.
    loader = yaml.BaseLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise _no_mapping(path, node.start_mark.line + 1)
        content, lines = {}, {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in content:
                raise InputError(
                    f"{path}:{line}: {name} must stand there once, got it again; leave one out"
                )
            content[name], lines[name] = loader.construct_object(value, deep=True), line
        return content, lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = 1 if mark is None else mark.line + 1
        problem = getattr(error, "problem", None) or str(error)
        raise InputError(
            f"{path}:{line}: config must be YAML, got {problem!r}; mend the line"
        ) from error
    finally:
        loader.dispose()


def _toml(path: Path, text: str) -> tuple[dict[Any, Any], dict[str, int]]:
    try:
        reader = import_module("tomllib")  # from Python 3.11 on
    except ModuleNotFoundError:
        raise InputError(
            f"config must be YAML on Python 3.10, got {str(path)!r}; write it so"
        ) from None
    try:
        content = reader.loads(text)
    except ValueError as error:
        raise InputError(
            f"{path}: config must be TOML, got {str(error)!r}; mend the line"
        ) from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"""\s*["']?([\w-]+)["']?\s*=""", line):
            lines.setdefault(match[1], number)
    return {name: _as_text(value) for name, value in content.items()}, lines


def _as_text(value: Any) -> Any:
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    return value if isinstance(value, dict) else str(value)


def _no_mapping(path: Path, line: int) -> InputError:
    return InputError(
        f"{path}:{line}: config must hold options, one below the other (rank: 8), got something "
        "else; write them so"
    )
