"""Options as they are written, once: on a command line, in JSON, and by name in Python.

A value is written under its own name, whatever group of options it stands in: ``--rank``, not
``--method.rank``. So groups can change, and what was written before is still read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

AnyOptions = TypeVar("AnyOptions")


def values(options: Any) -> dict[str, Any]:
    """Return every value by its name, those of groups where the group stands."""
    found: dict[str, Any] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        found |= values(value) if is_dataclass(value) else {item.name: value}
    return found


def types(kind: Any) -> dict[str, Any]:
    """Return the type of every value of a class of options, by its name."""
    return {name: hint for name, (hint, _) in _leaves(kind).items()}


def given(options: Any) -> dict[str, Any]:
    """Return by name what is not the default; values without a default are always given."""
    usual = _leaves(type(options))
    return {name: value for name, value in values(options).items() if value != usual[name][1]}


def flags(
    options: Any,
    *,
    without: Collection[str] = (),
    text: Callable[[str, Any], str] = lambda _, value: str(value),
) -> list[str]:
    """Return the words of a command line that say what is not the default.

    Args:
        options: Options of a subcommand, or a group of them.
        without: Names that are left out.
        text: How a value is written, by its name; a switch is its flag alone.
    """
    words = []
    for name, value in given(options).items():
        if name not in without:
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, text(name, value)]
    return words


def changed(options: AnyOptions, **new: Any) -> AnyOptions:
    """Return a copy with new values, each named as it is written, or with a new group.

    Raises:
        TypeError: Nothing has one of the names.
        InputError: A value breaks its rule.
    """
    content = values(options)
    for name, value in new.items():
        content |= values(value) if is_dataclass(value) else {name: value}
    return build(type(options), **content)


def build(kind: type[AnyOptions], /, **content: Any) -> AnyOptions:
    """Return options from their values: flat, in their groups, or as JSON has them.

    Args:
        kind: Their class.
        content: What ``values`` or ``dataclasses.asdict`` gives. A group may be a dictionary, or
            the group itself; where neither is there, its values stand beside the others. From JSON,
            paths are text and tuples are lists.

    Raises:
        TypeError: A name is unknown, or a value that has no default is missing.
        InputError: A value breaks its rule.
    """
    own: dict[str, Any] = {}
    for name, (hint, usual, group) in _fields(kind).items():
        if group is None or is_dataclass(content.get(name)):
            own |= {name: _value(hint, content.pop(name))} if name in content else {}
        elif isinstance(content.get(name), dict):
            own[name] = build(group, **content.pop(name))
        elif inner := {leaf: content.pop(leaf) for leaf in types(group) if leaf in content}:
            own[name] = build(group, **(values(usual) if is_dataclass(usual) else {}) | inner)
    return kind(**own, **content)


def _fields(kind: Any) -> dict[str, tuple[Any, Any, Any]]:
    """Type and default of every field, and the type again if the field is a group."""
    hints, found = get_type_hints(kind), {}
    for item in fields(kind):
        hint = hints[item.name]
        usual = item.default if item.default_factory is MISSING else item.default_factory()
        found[item.name] = hint, usual, hint if is_dataclass(hint) else None
    return found


def _leaves(kind: Any, usual_group: Any = None) -> dict[str, tuple[Any, Any]]:
    """Type and default of every value; the default of a group may say other ones than its class."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, (hint, usual, group) in _fields(kind).items():
        usual = getattr(usual_group, name, usual)
        inner = usual if is_dataclass(usual) else None
        found |= {name: (hint, usual)} if group is None else _leaves(group, inner)
    return found


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
