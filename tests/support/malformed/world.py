"""What is valid: a tiny model, data, adapters, a store, runs and their results; made once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from malformed.fault import Ran, run

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CHOICES = [
    {"prompt": f"is film {n} good? label:", "choices": ["good", "bad"], "answer": n % 2}
    for n in range(4)
]
RESPONSES = [{"prompt": f"what is {n}? answer:", "response": "four"} for n in range(4)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"what is {n}?"},
            {"role": "assistant", "content": "four"},
        ]
    }
    for n in range(4)
]
LABELS = [{"text": f"film {n}", "label": ["good", "bad"][n % 2]} for n in range(4)]
ROWS = {"choices": CHOICES, "response": RESPONSES, "messages": CHATS, "label": LABELS}


class World:
    """Valid inputs below a directory; commands on them are run when they are first asked for."""

    def __init__(self, root: Path, model: Path) -> None:
        self.root = root
        self.model = shutil.copytree(model, root / "model")
        config = json.loads((self.model / "tokenizer_config.json").read_text())
        config["chat_template"] = TEMPLATE
        (self.model / "tokenizer_config.json").write_text(json.dumps(config))
        self._figures: dict[tuple[str, ...], Any] = {}
        self._count = 0
        for kind, rows in ROWS.items():
            write_lines(root / f"{kind}.jsonl", rows)
        self.rows = root / "choices.jsonl"

    def fresh(self) -> Path:
        """Make a new empty directory."""
        self._count += 1
        path = self.root / "inputs" / f"{self._count:05d}"
        path.mkdir(parents=True)
        return path

    def result(
        self,
        argv: list[str],
        stdin: str = "",
        of: Callable[[Ran], Any] = lambda ran: ran.figures(),
    ) -> Any:
        """Return the result of a valid command, which is run once."""
        key = (*argv, stdin)
        if key not in self._figures:
            ran = run(argv, stdin)
            assert ran.code == 0, f"{argv}: {ran.err}{ran.raised}"
            self._figures[key] = of(ran)
        return self._figures[key]

    def evaluate(
        self, *more: str, model: Path | None = None, data: Path | None = None
    ) -> list[str]:
        """Return the words of a command that scores."""
        words = ["evaluate", "--model", str(model or self.model), "--data", str(data or self.rows)]
        return [*words, "--storage", "fp32", "--device", "cpu", "--json", "--quiet", *more]

    def train(self, output: Path, *more: str, model: Path | None = None) -> list[str]:
        """Return the words of a short training."""
        words = ["train", "--model", str(model or self.model), "--output-dir", str(output)]
        if "--data" not in more:
            words += ["--data", str(self.root / "response.jsonl")]
        words += ["--storage", "fp32", "--device", "cpu", "--json", "--quiet", "--reuse", "off"]
        return [*words, "--batch-size", "2", "--rank", "2", "--warmup-ratio", "0", *more]

    def trained(self, method: str) -> Path:
        """Return a run's directory with an adapter, two checkpoints and the scores of epochs."""
        path = self.root / f"run-{method}"
        if not path.is_dir():
            words = ["--method", method, "--epochs", "2", "--validation-data", str(self.rows)]
            ran = run(self.train(path, *words))
            assert ran.code == 0, ran.err + ran.raised
        return path

    def resumable(self) -> Path:
        """Return the directory of a run that was ended after its first epoch."""
        path = self.root / "resumable"
        if not path.is_dir():
            ran = run(self.train(path, *self._two_epochs, "--epochs", "1"))
            assert ran.code == 0, ran.err + ran.raised
            (path / "result.json").unlink()
            shutil.rmtree(path / "adapter")
        return path

    def undisturbed(self) -> Path:
        """Return the directory of the same run, which was not ended."""
        path = self.root / "undisturbed"
        if not path.is_dir():
            ran = run(self.train(path, *self._two_epochs, "--epochs", "2"))
            assert ran.code == 0, ran.err + ran.raised
        return path

    @property
    def _two_epochs(self) -> list[str]:
        # A constant rate does not depend on how long the run was meant to be.
        words = ["--schedule", "constant", "--logging-steps", "1"]
        return [*words, "--method", "loreft", "--validation-data", str(self.rows)]

    def resume(self, path: Path) -> list[str]:
        """Return the words of the command that goes on with a copy of ``resumable``."""
        return self.train(path, *self._two_epochs, "--epochs", "2", "--resume")

    @cached_property
    def store(self) -> Path:
        """A directory with the store of scoring the LoReFT adapter."""
        path = self.root / "reuse"
        ran = run(self.evaluate(*self.from_store(path)))
        assert ran.code == 0, ran.err + ran.raised
        assert any(path.iterdir())
        return path

    def from_store(self, path: Path) -> list[str]:
        """Return the words that make scoring use a store."""
        adapter = str(self.trained("loreft") / "adapter")
        return ["--adapter", adapter, "--reuse", "trunk", "--reuse-dir", str(path)]

    def copied(self, source: Path, *, linked: bool = True) -> Path:
        """Return a copy of a directory; its files are hard links, so replace and do not write."""
        target = self.fresh() / source.name
        shutil.copytree(source, target, copy_function=os.link if linked else shutil.copy2)
        return target


def replace(path: Path, content: bytes | str) -> Path:
    """Put a new file in the place of one that may be a hard link."""
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
