"""Options as they are written, once: on a command line, in JSON, and by name in Python.

A value is written under its own name, whatever group of options it stands in: ``--rank``, not
``--method.rank``. So groups can change, and what was written before is still read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import tyro

AnyOptions = TypeVar("AnyOptions")


@dataclass(frozen=True)
class Leaf:
    """A value of a class of options."""

    hint: Any
    """Its type."""
    usual: Any
    """Its default; ``dataclasses.MISSING`` if it has none."""
    group: Any
    """Its class, if it is a group of further values."""
    aliases: tuple[str, ...] = ()
    """Other flags of it."""
    positional: bool = False
    """Whether it is written as a word without a flag."""
    metavar: str | None = None
    """What the help calls its value, if not by its type."""


def values(options: Any) -> dict[str, Any]:
    """Return every value by its name, those of groups where the group stands."""
    found: dict[str, Any] = {}
    for item in fields(options):
        value = getattr(options, item.name)
        found |= values(value) if is_dataclass(value) else {item.name: value}
    return found


def types(kind: Any) -> dict[str, Any]:
    """Return the type of every value of a class of options, by its name."""
    return {name: leaf.hint for name, leaf in leaves(kind).items()}


def given(options: Any) -> dict[str, Any]:
    """Return by name what is not the default; values without a default are always given."""
    known = leaves(type(options))
    return {name: value for name, value in values(options).items() if value != known[name].usual}


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
            switched = isinstance(value, bool)
            words += [switch(name, value)] if switched else [flag(name), text(name, value)]
    return words


def flag(name: str) -> str:
    """Return how a value's name is written on a command line."""
    return f"--{name.replace('_', '-')}"


def switch(name: str, value: bool) -> str:
    """Return the flag that turns a switch on, or off."""
    return flag(name if value else f"no_{name}")


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
    for name, field in own_leaves(kind).items():
        group, usual = field.group, field.usual
        if group is None or is_dataclass(content.get(name)):
            own |= {name: _value(field.hint, content.pop(name))} if name in content else {}
        elif isinstance(content.get(name), dict):
            own[name] = build(group, **content.pop(name))
        elif inner := {leaf: content.pop(leaf) for leaf in leaves(group) if leaf in content}:
            own[name] = build(group, **(values(usual) if is_dataclass(usual) else {}) | inner)
    return kind(**own, **content)


def leaves(kind: Any, usual_group: Any = None) -> dict[str, Leaf]:
    """Return every value of a class of options, those of its groups where the group stands.

    Args:
        kind: The class.
        usual_group: An instance whose values are the defaults instead of those of the class.
    """
    found: dict[str, Leaf] = {}
    for name, field in own_leaves(kind).items():
        usual = getattr(usual_group, name, field.usual)
        inner = usual if is_dataclass(usual) else None
        if field.group is None:
            found[name] = replace(field, usual=usual)
        else:
            found |= leaves(field.group, inner)
    return found


def own_names(leaves: Mapping[str, Leaf]) -> dict[str, str]:
    """Return the name of each value by the other names that it has, written as the names are."""
    return {
        alias.lstrip("-").replace("-", "_"): name
        for name, leaf in leaves.items()
        for alias in leaf.aliases
    }


def own_leaves(kind: Any) -> dict[str, Leaf]:
    """Return the values of a class of options, and its groups as one value each."""
    hints, found = get_type_hints(kind, include_extras=True), {}
    for item in fields(kind):
        hint = hints[item.name]
        hint, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        usual = item.default if item.default_factory is MISSING else item.default_factory()
        aliases = [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        found[item.name] = Leaf(
            hint,
            usual,
            hint if is_dataclass(hint) else None,
            tuple(aliases),
            tyro.conf.Positional in extras,
            next((extra.metavar for extra in extras if getattr(extra, "metavar", None)), None),
        )
    return found


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, str) and Path in (hint, *get_args(hint)):
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
