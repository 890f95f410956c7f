"""What ``--help`` says of a subcommand: what must be given, what most runs give, then each group.

The text is that of the dataclasses: docstrings of fields are read from the source.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from lowmem_reft.options.written import Leaf, flag, own_leaves, switch

OFTEN = (
    *("task", "method", "storage", "adapter", "gpu", "fit", "methods", "epochs", "lr"),
    *("batch_size", "max_length", "validation_data", "eval_data", "memory_gib", "seeds", "limit"),
)
"""Options that most runs give; of those of a subcommand the first are shown before the others."""

_MOST, _INDENT, _WIDEST = 10, 24, 100
_METAVARS = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


class _Option(NamedTuple):
    name: str
    leaf: Leaf
    about: str


def help_of(command: str, kind: Any, more: str) -> str:
    """Return the help of a subcommand, as wide as the terminal.

    Args:
        command: How it is called.
        kind: The class of its options.
        more: What is said below its docstring.
    """
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    groups = list(_groups("options", kind))
    known = {option.name: option for _, _, options in groups for option in options}
    needed = [name for name, option in known.items() if option.leaf.usual is MISSING]
    often = [name for name in OFTEN if name in known and name not in needed]
    often = often[: _MOST - len(needed)] if len(known) > _MOST else []
    calls = [_invocation(known[name], short=True) for name in needed]
    parts = ["\n".join(_wrap(" ".join(("usage:", command, *calls, "[options]")), width))]
    paragraphs = f"{inspect.getdoc(kind)}\n\n{more}".split("\n\n")
    parts += ["\n".join(_wrap(about, width)) for about in paragraphs]
    first = {"required": needed, "often given": often}
    boxes = [(title, "", [known[name] for name in names]) for title, names in first.items()]
    for title, about, options in groups:
        left = [option for option in options if option.name not in (*needed, *often)]
        boxes.append((title, about, left))
    for title, about, options in boxes:
        if options:
            lines = _wrap(f"{title}: {about}".strip(), width)
            parts.append("\n".join([*lines, *(_shown(option, width) for option in options)]))
    return "\n\n".join([*parts, f"{'  -h, --help':<{_INDENT}}Say this."])


def _groups(
    title: str, kind: Any, instance: Any = None
) -> Iterator[tuple[str, str, list[_Option]]]:
    """Yield title, docstring and options of a class, then those of the groups in it.

    Values of ``instance`` are the defaults, if there is one.
    """
    docstrings, inner, own = _docstrings(kind), [], []
    for name, leaf in own_leaves(kind).items():
        usual = getattr(instance, name, leaf.usual)
        if leaf.group is None:
            own.append(_Option(name, replace(leaf, usual=usual), docstrings[name]))
        else:
            inner.append((name, leaf.group, usual if is_dataclass(usual) else None))
    yield title, "" if title == "options" else inspect.getdoc(kind) or "", own
    for name, group, usual in inner:
        kind = group if usual is None else type(usual)
        yield from _groups(name.replace("_", "-"), kind, usual)


def _shown(option: _Option, width: int) -> str:
    """An option with its docstring beside or below it."""
    usual, about = option.leaf.usual, option.about
    if not (usual is MISSING or usual is None or isinstance(usual, bool) or usual in ("", ())):
        about += f" (default: {usual})"
    call = _wrap(f"  {_invocation(option)}", width, indent="      ")
    lines = _wrap(" " * _INDENT + " ".join(about.split()), width, indent=" " * _INDENT)
    if len(call) == 1 and len(call[0]) <= _INDENT - 2:
        return "\n".join([f"{call[0]:<{_INDENT}}{lines[0].lstrip()}", *lines[1:]])
    return "\n".join([*call, *lines])


def _invocation(option: _Option, *, short: bool = False) -> str:
    """How an option is written, with its other names unless it is to be short."""
    leaf = option.leaf
    value = leaf.metavar or _metavar(leaf.hint)
    if leaf.positional:
        return value
    flags = [flag(option.name), *(() if short else leaf.aliases)]
    flags += [switch(option.name, False)] if leaf.usual is True else []
    return f"{', '.join(flags)} {value}".rstrip()


def _metavar(hint: Any) -> str:
    """What stands for a value of a type; nothing for a switch."""
    if hint is bool:
        return ""
    if get_origin(hint) is Literal:
        choices = ",".join(map(str, get_args(hint)))
        return "{" + (choices if len(choices) < 60 else choices.replace(",", ", ")) + "}"
    inner = [part for part in get_args(hint) if part not in (type(None), ...)]
    if get_origin(hint) is tuple:
        return f"{_metavar(inner[0])} ..."
    return "|".join(map(_metavar, inner)) if inner else _METAVARS[hint]


def _wrap(said: str, width: int, indent: str = "") -> list[str]:
    """Lines of text that leave words with hyphens whole: they are flags."""
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return wrapper.wrap(said)


def _docstrings(kind: type) -> dict[str, str]:
    """The docstring of each field of a class, those that it inherits included."""
    found: dict[str, str] = {}
    for one in reversed(kind.__mro__[:-1]):
        found |= _of_module(one.__module__).get(one.__name__, {})
    return found


@cache
def _of_module(name: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[name]))
    return {
        node.name: {
            field.target.id: str(said.value.value)
            for field, said in zip(node.body, node.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(said, ast.Expr)
            and isinstance(said.value, ast.Constant)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
