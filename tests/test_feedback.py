"""What a person sees meanwhile: bars with the time left on a terminal, plain text elsewhere."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from lowmem_reft import cli, options
from lowmem_reft.data import joint, tokens
from lowmem_reft.machine import progress

BAR_OF_TRAINING = r"training .*?\d/6.*? steps/s, \d:\d\d:\d\d left"
BAR_OF_OURS = r"scoring .*?\d+% .*?\d:\d\d:\d\d"
COLOUR = r"\x1b\[[0-9;]*?3[0-9]|\x1b\[[0-9;]*?38;"

Show = Callable[[list[str]], str]


@pytest.fixture
def arguments(tiny_llama_dir: Path, tmp_path: Path) -> list[str]:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "is the film good? label:", "choices": ["good", "bad"], "answer": 1}
    rows.write_text(f"{json.dumps(row)}\n" * 24)
    command = f"train --model {tiny_llama_dir} --device cpu --data {rows} --eval-data {rows} "
    return [*command.split(), *f"--max-steps 6 --output-dir {tmp_path / 'out'}".split()]


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Show]:
    """Runs a command with both streams on a terminal and returns what is written there."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")

    def show(command: list[str]) -> str:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        written: list[bytes] = []

        def read() -> None:
            while chunk := os.read(ours, 65536):
                written.append(chunk)
                if b"\x04" in chunk:
                    return

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            code = cli.main(command)
            stream.write("\x04")
            stream.flush()
            reader.join()
        os.close(ours)
        assert code == 0
        return b"".join(written).decode()

    yield show
    transformers.utils.logging.enable_progress_bar()
    progress.show_bars(True)


def test_a_terminal_shows_bars_with_the_time_that_is_left(
    arguments: list[str], on_a_terminal: Show
) -> None:
    rows = Path(arguments[arguments.index("--eval-data") + 1])
    more = rows.with_name("more.jsonl")  # more than a moment's work
    more.write_text(rows.read_text() * 150)
    shown = on_a_terminal([*arguments, "--eval-data", str(more)])
    assert re.search(BAR_OF_TRAINING, shown)
    assert re.search(BAR_OF_OURS, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    assert re.search(COLOUR, shown)


def test_quiet_shows_no_bar_on_a_terminal(arguments: list[str], on_a_terminal: Show) -> None:
    shown = on_a_terminal([*arguments, "--quiet"])
    assert not re.search(BAR_OF_TRAINING, shown)
    assert "scoring" not in shown
    assert "Loading weights" not in shown
    assert "eval_accuracy" in shown


def test_no_color_is_honoured(
    arguments: list[str], on_a_terminal: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    shown = on_a_terminal(arguments)
    assert re.search(BAR_OF_TRAINING, shown)
    assert not re.search(COLOUR, shown)


def test_without_a_terminal_everything_is_plain_text(
    arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    assert "eval_accuracy" in out
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    transformers.utils.logging.enable_progress_bar()


def test_tokenizing_many_rows_shows_a_bar_and_changes_nothing(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_llama_dir)
    rows = [tokens.Row(source=str(i), prompt=f"film {i}", response="good") for i in range(7)]
    whole = tokens.encode_rows(rows, tokenizer).examples
    seen: list[tuple[str, bool]] = []

    def watched(items: Any, what: str, *, quiet: bool) -> Any:
        seen.append((what, quiet))
        return items

    monkeypatch.setattr(joint, "progress", watched)
    assert tokens.encode_rows(rows, tokenizer).examples == whole
    monkeypatch.setattr(joint, "TEXTS_AT_ONCE", 3)
    assert tokens.encode_rows(rows, tokenizer).examples == whole
    assert seen == [("tokenizing", True)] * 2 + [("tokenizing", False)] * 2


def flags(options_type: Any) -> set[str]:
    found = set()
    for field in fields(options_type):
        found.add(field.name)
        default = field.default_factory
        if is_dataclass(default):
            found |= flags(default)
    return found


SILENT = {options.ChatOptions: {"quiet"}}
"""A talk is no object."""


@pytest.mark.parametrize(
    "options_type",
    [
        options.RunOptions,  # of train
        *(
            kind
            for kind in get_args(cli.Options)
            if kind not in (options.TrainOptions, options.ReuseCommandOptions)
        ),
        options.ReuseListOptions,
        options.ReuseRemoveOptions,
    ],
    ids=lambda kind: kind.__name__,
)
def test_every_command_has_json_and_quiet(options_type: type) -> None:
    assert SILENT.get(options_type, {"json", "quiet"}) <= flags(options_type)


def test_the_table_of_plan_shows_a_bar(
    on_a_terminal: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowmem_reft.memory.verdict.longest_seq_len", lambda *_args, **_more: 64)
    shown = on_a_terminal(
        ["plan", "--table", "--model", "llama-3.1-8b", "--methods", "loreft,qlora"]
    )
    assert "finding the longest contexts" in shown
    assert re.search(r"\d:\d\d:\d\d|-:--:--", shown)
