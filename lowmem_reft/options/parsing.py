"""A command line becomes options of a subcommand, by tyro; what is wrong is said in one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from lowmem_reft.errors import InputError
from lowmem_reft.options import complaint, help, run_file, written

_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _choice_or_nothing(info: Any) -> Any:
    """Offer the choices of ``Literal | None`` in their order; tyro's own would be that of a set."""
    first, *rest = get_args(info.type) or (None,)
    if rest != [type(None)] or get_origin(first) is not Literal:
        return None
    choices = get_args(first)
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(choices) + "}",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


def parse(arguments: list[str], commands: Mapping[str, Any], description: str) -> Any:
    """Turn the arguments into options.

    Args:
        arguments: Those of the process; the first names the subcommand.
        commands: The class of options of each subcommand.
        description: What the help of the program says.

    Raises:
        InputError: A value breaks its rule.
        SystemExit: The help was asked for, or what is wrong has been said.
    """
    # tyro knows of the one subcommand alone, so what it suggests for a typo is an option of that.
    kind = commands.get(arguments[0]) if arguments else None
    name = f"lowmem-reft {arguments[0]}" if kind else "lowmem-reft"
    words, entries = arguments, dict[str, run_file.Entry]()
    if kind:
        words, entries = _with_file(arguments, kind)
        description = f"{inspect.getdoc(kind)}\n\n{run_file.HELP}"

    def parsed() -> Any:
        return tyro.cli(
            kind or _any_of(commands),
            prog=name,
            description=description,
            args=words,
            config=(
                tyro.conf.OmitArgPrefixes,  # --rank, not --method.rank
                tyro.conf.DisallowNone,  # "--rank INT", not "--rank {None}|INT"
                tyro.conf.FlagCreatePairsOff,  # a flag says what is not the default: no --no-json
            ),
            registry=_REGISTRY,
        )

    # tyro would print what a dataclass refuses under a name of its own and wrap the message, so it
    # speaks only when it is asked for help.
    box = io.StringIO()
    try:
        with contextlib.redirect_stdout(box), contextlib.redirect_stderr(box):
            return parsed()
    except SystemExit as left:
        error: BaseException | None = left
        while error is not None:
            if isinstance(error, InputError):
                raise InputError(run_file.blamed(str(error), entries)) from None
            error = error.__context__
        said = _unknown(arguments, commands) or complaint.one_line(box.getvalue())
        if left.code and said:
            said = run_file.blamed(said, entries)
            print(f"{name}: error: {said}; see {name} --help", file=sys.stderr)
            raise SystemExit(left.code) from None
        if not left.code and kind and "action" not in written.own_leaves(kind):
            print(help.help_of(name, kind, run_file.HELP))
            raise
    return parsed()


def _with_file(arguments: list[str], kind: Any) -> tuple[list[str], dict[str, run_file.Entry]]:
    """Return the words after the command's name, with those of ``--config FILE`` before them."""
    if arguments[1:2] and (action := _actions(kind).get(arguments[1])):
        words, entries = _with_file([arguments[0], *arguments[2:]], action)
        return [arguments[1], *words], entries
    words, path = run_file.take(run_file.with_bare_switches(arguments[1:], kind))
    if path is None:
        return run_file.without_usual_switches(words, kind), {}
    given = complaint.given_flags(words)
    entries = run_file.read(path, arguments[0], kind, given=given)
    own = [word for entry in entries.values() for word in entry.words]
    return run_file.without_usual_switches([*own, *words], kind), entries


def _unknown(arguments: list[str], commands: Mapping[str, Any]) -> str:
    """Say which command or which options there are not; empty if it is something else."""
    named = arguments[:1] if arguments and not arguments[0].startswith("-") else []
    kind = commands.get(named[0]) if named else None
    if kind is None:
        return complaint.misspelled(named, commands, "command")
    if actions := _actions(kind):
        return _unknown(arguments[1:], actions)
    given = complaint.given_flags(run_file.without_usual_switches(arguments[1:], kind))
    return complaint.misspelled(given, complaint.known_flags(kind), "options")


def _actions(kind: Any) -> dict[str, Any]:
    """Return the options of each action of a command by the action's name; most have none."""
    hint = get_type_hints(kind, include_extras=True).get("action")
    return {part.__metadata__[0].name: get_args(part)[0] for part in get_args(hint)}


def _any_of(commands: Mapping[str, Any]) -> Any:
    """Return the union of all subcommands' options."""
    named = [Annotated[kind, tyro.conf.subcommand(name)] for name, kind in commands.items()]
    return Union[tuple(named)]  # noqa: UP007 - there is no | of a list
