"""The code blocks of README.md and docs/, and what runs them: as written but for a few names.

``python`` blocks of a page run one after the other in one namespace, ``bash`` blocks through the
command line in this process; a block with a title is a file. ``text`` is not run: it is the output
of the block before if its title says so, else something to read.
"""

from __future__ import annotations

import re
import runpy
import shlex
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from lowmem_reft import cli

LANGUAGES = ("python", "bash", "json", "yaml", "text")
FENCE = re.compile(
    r'^(?P<indent> *)```(?P<language>\w*)(?: title="(?P<title>[^"]+)")?\n(?P<code>.*?)^ *```$',
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page."""

    place: str
    """``page:line``."""
    language: str
    title: str | None
    code: str


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            place=f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}",
            language=match["language"],
            title=match["title"],
            code=textwrap.dedent(match["code"]),
        )
        for match in FENCE.finditer(text)
    ]


class Runner:
    """Runs blocks in the current directory.

    Args:
        replaced: What is written in a page, and what it is replaced by.
        arguments: What each subcommand is given beside what is written, so that it is quick.
        printed: Returns what has been printed since it was last asked.
    """

    def __init__(
        self,
        replaced: dict[str, str],
        *,
        arguments: dict[str, list[str]] | None = None,
        printed: Callable[[], str] = str,
    ) -> None:
        self.replaced = replaced
        self.arguments = arguments or {}
        self.printed = printed
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.last_output = ""

    def run(self, block: Block) -> None:
        assert block.language in LANGUAGES, f"{block.place}: what is ```{block.language}?"
        if block.language == "text":
            if block.title == "output":
                self._compare(block)
            return
        self.printed()
        code = block.code
        for written, stands_for in self.replaced.items():
            code = code.replace(written, stands_for)
        if block.title is not None:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(code, encoding="utf-8")
        elif block.language == "python":
            exec(compile(code, block.place, "exec"), self.names)
        else:
            assert block.language == "bash", f"{block.place}: a file needs a title"
            for words in commands(code):
                self._command(words, block.place)
        self.last_output = self.printed()

    def _command(self, words: list[str], place: str) -> None:
        if words[:2] == ["accelerate", "launch"]:
            launched = launch_command_parser().parse_args(words[2:])
            load_config_from_file(launched.config_file)  # one process here: the rest of the line
            words = [launched.training_script, *launched.training_script_args]
            assert bool(launched.module) == (words[0] == "lowmem_reft.cli"), place
        if words[0] in ("lowmem-reft", "lowmem_reft.cli"):
            code = cli.main([*words[1:], *self.arguments.get(words[1], [])])
            assert code == 0, f"{place}: {words} ended with {code}: {self.printed()}"
        elif words[0].endswith(".py") or words[0] == "python":
            runpy.run_path(words[-1], run_name="__main__")
        else:
            raise AssertionError(f"{place}: nothing here runs {words[0]}; should it be text?")

    def _compare(self, block: Block) -> None:
        """Every line is there, whatever its figures; columns may have been left out."""
        real = [_cells(line) for line in self.last_output.splitlines()]
        for line in block.code.splitlines():
            wanted = _cells(line)
            if line.strip() in ("...", ""):
                continue
            found = any(_is_within(wanted, cells) for cells in real)
            assert found, f"{block.place}: {line!r} is not in\n{self.last_output}"


def commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def _cells(line: str) -> list[str]:
    """Words of a line with every figure, digest and name of a model as one sign."""
    line = re.sub(r"-?[0-9a-f]{16,}|[-+]?\d[\d,.]*(?:e[-+]?\d+)?", "#", line)
    line = re.sub(r"^\S+, (\w+) on ", r"MODEL, \1 on ", line)
    line = re.sub(r"--model \S+", "--model MODEL", line)
    return line.split()


def _is_within(wanted: list[str], cells: list[str]) -> bool:
    """Whether the first words are the same and the others come in the same order."""
    rest = iter(cells)
    return wanted[:2] == cells[:2] and all(word in rest for word in wanted)
