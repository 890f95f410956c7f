"""Build the small task that the package ships: what kind of text from a Python source is this?

Aim: rows on which an untuned model guesses and a tuned one is mostly right, from real text that
every Python carries. A row shows the first sentence of a docstring, the message of an error, a
statement or the first sentence of a manual's paragraph; the answer is its kind.

No module (or manual page) and no text is in two splits, and every kind is equally frequent.
Another Python version gives slightly other rows.

Command, from the repository root::

    python recipes/embedded_task.py

Expected: 800 training, 240 validation and 400 test rows in ten seconds, on any machine.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

KINDS = ["code", "docstring", "error", "manual"]
SPLITS = {"train": 800, "validation": 240, "test": 400}
NOT_DOCUMENTATION = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
WORDS = range(4, 21)
"""A shorter text says too little; a longer one is cut."""
MAX_CHARACTERS = 90
"""So that a prompt stays under 64 tokens of the embedded model."""


def read_texts() -> Iterator[tuple[str, str, str]]:
    """Every (module or manual page, kind, text) of this Python, in a fixed order."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        if NOT_DOCUMENTATION & set(path.relative_to(stdlib).parts) or path.name == "topics.py":
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, SyntaxError):
            continue  # templates and samples of broken code
        module = str(path.relative_to(stdlib))
        for node in ast.walk(tree):
            for kind, text in texts_of(node):
                yield module, kind, text
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            if re.match(r"\s*[A-Z]", paragraph):  # not a heading's underline, list or example
                yield f"manual page {name}", "manual", first_sentence(paragraph)


def texts_of(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The docstring, error message or one-line statement that a node of the syntax tree holds."""
    match node:
        case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            if docstring := ast.get_docstring(node):
                yield "docstring", first_sentence(docstring)
        case ast.Raise(exc=ast.Call(args=[message, *_])):
            if isinstance(message, ast.BinOp):  # "..." % values
                message = message.left
            parts = message.values if isinstance(message, ast.JoinedStr) else [message]
            texts = [part.value if isinstance(part, ast.Constant) else "%s" for part in parts]
            if isinstance(message, ast.JoinedStr) or isinstance(texts[0], str):
                yield "error", " ".join("".join(texts).split())
        case ast.Assign() | ast.AugAssign() | ast.Return() | ast.Expr(value=ast.Call()):
            yield "code", ast.unparse(node)


def first_sentence(text: str) -> str:
    """Up to the first full stop, colon, exclamation or question mark before white space."""
    text = " ".join(text.split())
    found = re.match(r".+?[.:!?](?=\s|$)", text)
    return found.group() if found else text


def split_by_module(
    texts: list[tuple[str, str, str]], seed: int
) -> dict[str, list[tuple[str, str]]]:
    """Balanced (kind, text) rows per split; a module belongs to one split, a text occurs once."""
    generator = random.Random(seed)
    modules = sorted({module for module, _, _ in texts})
    generator.shuffle(modules)
    generator.shuffle(texts)
    bounds = {"train": 0.0, "validation": 0.5, "test": 0.65}
    position = {module: i / len(modules) for i, module in enumerate(modules)}
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    counts: Counter[tuple[str, str]] = Counter()
    for module, kind, text in texts:
        split = [name for name, start in bounds.items() if position[module] >= start][-1]
        if counts[split, kind] < SPLITS[split] // len(KINDS):
            counts[split, kind] += 1
            rows[split].append((kind, text))
    short = {split: len(rows[split]) for split in SPLITS if len(rows[split]) < SPLITS[split]}
    if short:
        raise SystemExit(f"this Python has too few texts: {short} of {SPLITS}; lower SPLITS")
    return rows


def main() -> None:
    """Collect, drop duplicates, split, write."""
    parser = argparse.ArgumentParser(description="Build the embedded task.")
    parser.add_argument("--output-dir", type=Path, default=Path("lowmem_reft/data/embedded/task"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    unique: dict[str, tuple[str, str, str]] = {}
    for module, kind, text in read_texts():
        words = text.split()
        cut = " ".join(words[: WORDS.stop - 1])
        if len(words) >= WORDS.start and len(cut) <= MAX_CHARACTERS and cut.isascii():
            unique.setdefault(cut.casefold(), (module, kind, cut))

    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in split_by_module(list(unique.values()), arguments.seed).items():
        with (arguments.output_dir / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for kind, text in rows:
                row = {
                    "prompt": f"Text: {text}\nKind:",
                    "choices": KINDS,
                    "answer": KINDS.index(kind),
                }
                file.write(json.dumps(row) + "\n")
        print(split, dict(sorted(Counter(kind for kind, _ in rows).items())))


if __name__ == "__main__":
    main()
