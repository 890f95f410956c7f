"""What mkdocs does beyond its plugins: options of the command line, reports of kept results.

``<!-- commands -->`` in a page becomes a section for each subcommand. Docstrings are read by
griffe, which mkdocstrings brings along; types and defaults are those of the dataclasses.
``evidence/NAME.html`` is the report of ``benchmarks/results/NAME.json``, for those of EVIDENCE.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

from benchmarks.collect import page_of
from lowmem_reft import cli
from lowmem_reft.options import written

MARK = "<!-- commands -->"
TABLE = re.compile(r"<!-- table:\w+ -->\n(.*?)<!-- /table -->", re.DOTALL)
EVIDENCE = ("real_smollm2", "real_minilm", "real_minilm_sst2")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
Subcommand = tuple[str, type]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the options, and mark tables of results for the style sheet; for every page."""
    if MARK in markdown:
        markdown = markdown.replace(MARK, "\n".join(_commands()))
    return TABLE.sub(_measured, markdown)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the report pages, which pages can link to."""
    for name in EVIDENCE:
        content = page_of(RESULTS / f"{name}.json")
        files.append(File.generated(config, f"evidence/{name}.html", content=content))
    return files


def _measured(match: re.Match[str]) -> str:
    table = match[1].replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return f'<div class="measured" markdown>\n\n{table}\n</div>'


class LiteralBlocks(griffe.Extension):
    """Lets Markdown show what reStructuredText calls a literal block: ``::`` and indented lines."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of everything that is documented."""
        if obj.docstring is not None:
            text = re.sub(r"^::\n", "", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = text.replace("::\n\n    ", ":\n\n    ")


def subcommands() -> list[Subcommand]:
    """Every subcommand with the class of its options, ``reuse ls`` and its like included."""
    found = []
    for name, command in cli._COMMANDS.items():
        options = command.options
        nested = [field.type for field in dataclasses.fields(options) if field.name == "action"]
        if nested:
            action = typing.get_type_hints(options, include_extras=True)["action"]
            found += [(f"{name} {inner}", of) for inner, of in _alternatives(action)]
        else:
            found.append((name, options))
    return found


def _alternatives(union: Any) -> list[Subcommand]:
    """Name and class of each member of a union of tyro's subcommands."""
    found = []
    for member in typing.get_args(union):
        options, *marks = typing.get_args(member)
        found.append((next(mark.name for mark in marks if hasattr(mark, "name")), options))
    return found


def _commands() -> Iterator[str]:
    module = griffe.load("lowmem_reft.options")
    for name, options in subcommands():
        yield f"\n## {name}\n\n{module[options.__name__].docstring.value}\n"
        yield from _options(module, options)


def _options(module: Any, options: type) -> Iterator[str]:
    """The options of a class: its own first, then those of each group of options."""
    hints = typing.get_type_hints(options, include_extras=True)
    groups = []
    for field in dataclasses.fields(options):
        group = _group(field, hints[field.name])
        if group is not None:
            groups.append(group)
            continue
        about = module[options.__name__].all_members[field.name].docstring.value
        about = "\n    ".join(_as_markdown(about).splitlines())
        yield f"{_term(field, hints[field.name])}\n:   {about}{_default(field)}\n"
    for group in groups:
        title = " ".join(re.findall("[A-Z][a-z]+", group.__name__)[:-1]).lower()
        about = _as_markdown(module[group.__name__].docstring.value)
        yield f"**{title.capitalize()}.**{{ .group }} {about}\n"
        yield from _options(module, group)


def _as_markdown(help_text: str) -> str:
    """The text of the help with flags as code, and nothing else in it taken for markup."""
    escaped = re.sub(r"([*<\[\]])", r"\\\1", help_text)
    return re.sub(r"(--[a-z][a-z-]*)", r"`\1`", escaped)


def _group(field: Any, hint: Any) -> type | None:
    """The class of a group of options: of its default, where it has one."""
    made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    kind = hint if made is None else type(made)
    return kind if dataclasses.is_dataclass(kind) else None


def _term(field: Any, hint: Any) -> str:
    """The flag as it is typed, its other names, and what follows it."""
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        marks, hint = hint.__metadata__, hint.__origin__
    metavar = next((mark.metavar for mark in marks if getattr(mark, "metavar", None)), None)
    if metavar:
        return f"`{metavar}`"  # what has one is given without a flag
    flags = [written.flag(field.name)]
    flags += [written.switch(field.name, False)] if field.default is True else []
    flags += next((mark.aliases for mark in marks if getattr(mark, "aliases", None)), ())
    return ", ".join(f"`{flag}`" for flag in flags) + _values(hint)


def _values(hint: Any) -> str:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    said = []
    for kind in typing.get_args(hint) if union else (hint,):
        if typing.get_origin(kind) is typing.Literal:
            said += [f"`{value}`" for value in typing.get_args(kind)]
        elif kind not in (bool, types.NoneType):
            said.append(_KINDS[kind])
    return " " + " · ".join(said) if said else ""


_KINDS: dict[Any, str] = {
    int: "*whole number*",
    float: "*number*",
    str: "*text*",
    Path: "*path*",
    tuple[str, ...]: "*text ...*",
}


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
        return " **Required.**"
    if isinstance(field.default, bool) or field.default in (None, "", ()):
        return ""  # the text says what holds then
    return f" Default: `{field.default}`."
