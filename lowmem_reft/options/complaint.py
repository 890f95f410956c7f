"""What tyro says of a wrong command line, in one line.

It draws a box of what is wrong, a rule, and below it the help of the options that are meant. In a
log, or among the lines of many runs, nobody reads that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from lowmem_reft.options import elsewhere, written

_FLAG = re.compile(r"--[\w-]+")
_ALIKE = 0.65
"""Share of letters that a name has in common with what is meant; less is chance."""

_MOST_CHARACTERS = 400
"""Of what was given: the rest of a longer text says nothing."""


def one_line(box: str) -> str:
    """Return what is wrong and which flags are meant, without frame, rules and help.

    Args:
        box: All that tyro printed.

    Returns:
        One line without a full stop; empty if there is no box of the known kind.
    """
    # Of letters or of lines, which depends on the stream; the first line is the title.
    lines = [line[1:-1].rstrip() for line in box.splitlines()[1:] if not line.startswith("╰")]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.strip(" ─-"):
            parts[-1].append(line)
        elif line.strip():  # a rule
            parts.append([])
    first, *others = [part for part in parts if part] or [[]]
    if not first:
        return ""
    if first[0].strip().startswith("Missing from"):
        return f"options must be given, got none of {', '.join(_flags(first))}"
    said = " ".join(" ".join(first).split()).removesuffix(".")
    if len(said) > _MOST_CHARACTERS:
        said = f"{said[: _MOST_CHARACTERS // 2]} ... {said[-_MOST_CHARACTERS // 2 :]}"
    meant = [part for part in others if re.search("similar|Perhaps", part[0])]
    similar = [flag for part in meant for flag in _flags(part)]
    unknown = [line for part in others if part[0].strip().startswith("Unrec") for line in part]
    if unknown:
        said += f"; {' '.join(' '.join(unknown).split())}"
    return f"{said}; similar: {', '.join(dict.fromkeys(similar))}" if similar else said


def misspelled(words: Sequence[str], known: Iterable[str], what: str) -> str:
    """Return which words are none of the known ones, with what is meant; empty if all are known.

    What other trainers call an option is told apart from what is misspelled.

    Args:
        words: What was given.
        known: What there is.
        what: Names both: ``"options"``.
    """
    names = list(known)
    unknown = [word for word in words if word not in names]
    if not unknown:
        return ""
    said = f"unknown {what}: {', '.join(dict.fromkeys(unknown))}"
    return said + _meant(unknown, names)


def given_flags(words: Sequence[str]) -> list[str]:
    """Return the flags among words as they are spelled here: with hyphens, without values."""
    return [
        word.partition("=")[0].replace("_", "-") for word in words if re.match("--[a-zA-Z]", word)
    ]


def without_flag(words: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """Return the words without a flag that takes a value, and its values; "" where none follows."""
    rest, values = [], []
    left = iter(words)
    for word in left:
        name, equals, value = word.partition("=")
        if name == flag:
            values.append(value if equals else next(left, ""))
        else:
            rest.append(word)
    return rest, values


def no_option(name: str, command: str, known: Iterable[str]) -> str:
    """Say that a command has no option of a name, and which one is meant."""
    return (
        f"{name} must be an option of {command}, got no such one{_meant([name], list(known))}; "
        f"see lowmem-reft {command} --help"
    )


def known_flags(options: Any) -> list[str]:
    """Return every flag of a class of options, its other names too."""
    found = ["--help", "--config"]
    for name, leaf in written.leaves(options).items():
        found += [written.flag(name), *leaf.aliases]
        found += [written.switch(name, False)] if leaf.usual is True else []
    return found


def _meant(unknown: Sequence[str], known: Sequence[str]) -> str:
    """Return what to write here for names of other trainers, and what is like the others."""
    here = elsewhere.here(unknown, known)
    # Without the hyphens, which all flags have in common.
    bare = {word.lstrip("-"): word for word in known}
    near = [
        bare[name]
        for word in unknown
        if word not in here
        for name in get_close_matches(word.lstrip("-"), list(bare), n=1, cutoff=_ALIKE)
    ]
    said = f"; here: {', '.join(dict.fromkeys(here.values()))}" if here else ""
    return f"{said}; similar: {', '.join(dict.fromkeys(near))}" if near else said


def _flags(lines: list[str]) -> list[str]:
    """Return the flags of options that are listed with their help, which is indented more."""
    listed = [re.match(r" {3,6}(\S.*)", line) for line in lines]
    return [
        flags[-1] if (flags := re.findall(_FLAG, match[1])) else match[1]
        for match in listed
        if match
    ]
