"""The commands as functions: ``lowmem_reft.train(model=..., data=..., output_dir=...)`` and others.

Keywords are the options' names of the command line (``--max-length`` is ``max_length``), with the
same defaults and checks. Rows may be given as they are, as a list of dictionaries, where a file is
expected; prompts likewise. What comes back holds the figures of ``--json``, as keys and attributes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from lowmem_reft.errors import InputError
from lowmem_reft.machine.files import write_text_whole
from lowmem_reft.machine.progress import show_bars, without_bars_of_transformers
from lowmem_reft.options import (
    CompareOptions,
    EvaluateOptions,
    GenerateOptions,
    ModelOptions,
    PlanOptions,
    TrainOptions,
    complaint,
    written,
)

_ROWS = ("data", "validation_data", "eval_data", "examples", "input")
"""Options that name a file of rows."""


class Result(dict[str, Any]):
    """The figures of a command, by their names, which are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"{type(self).__name__} has no {name!r}; it has {', '.join(self)}"
            ) from None

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self]


class TrainResult(Result):
    """What a training has come to; see ``train``."""

    def load(self, *, quiet: bool = False) -> tuple[Any, Any]:
        """Return the base with the adapter on it, in evaluation mode, and the tokenizer.

        With ``quiet`` no bar shows how far that is.
        """
        # Here, as they import torch.
        from lowmem_reft.methods.card import load_card
        from lowmem_reft.methods.loading import load_adapted

        adapter = Path(self["adapter_dir"])
        card = load_card(adapter)
        assert card is not None
        with without_bars_of_transformers() if quiet else contextlib.nullcontext():
            return load_adapted(ModelOptions(model=card.base), adapter, card)


def train(*, model: str, data: Any, output_dir: str | Path, **options: Any) -> TrainResult:
    """Fine-tune one adapter on a frozen base.

    Args:
        model: Hub id or local directory of the base.
        data: A file of rows, a datasets id, or rows as dictionaries, which are written to a file in
            ``output_dir``.
        output_dir: Directory of the run.
        options: As of ``lowmem-reft train``: ``method``, ``rank``, ``lr``, ``epochs``, ...

    Returns:
        What ``runs.train.run_training`` says: ``adapter_dir``, ``train_loss``, ``peak_bytes``, ...
        Its ``load()`` gives the model.

    Raises:
        InputError: An option, a file or a row is wrong.
    """
    options = {**options, "model": model, "data": data, "output_dir": output_dir}
    return TrainResult(_run("train", TrainOptions, "runs.train:run_training", options))


def evaluate(*, model: str, data: Any = "", **options: Any) -> Result:
    """Score a base, or a base with an adapter.

    Args:
        model: Hub id or local directory of the base.
        data: A file of rows, a datasets id, or rows as dictionaries; not with ``lm_eval``.
        options: As of ``lowmem-reft evaluate``: ``adapter``, ``metric``, ...

    Returns:
        What ``runs.evaluate.run_evaluation`` says: ``metric``, ``value``, ``loss``, ...

    Raises:
        InputError: An option, a file or a row is wrong.
    """
    options = {**options, "model": model, "data": data}
    return Result(_run("evaluate", EvaluateOptions, "runs.evaluate:run_evaluation", options))


def generate(*, model: str, **options: Any) -> Result:
    """Let a base and its adapters answer.

    Args:
        model: Hub id or local directory of the base.
        options: As of ``lowmem-reft generate``: ``prompt``, or ``input`` as a file or as rows with
            ``prompt`` or ``messages``; ``adapter``, ``max_new_tokens``, ...

    Returns:
        What ``runs.generate.run_generation`` says, and ``answers``: the lines of its output. For a
        single ``prompt`` ``response``.

    Raises:
        InputError: An option, a file or a row is wrong.
    """
    options = {**options, "model": model}
    with tempfile.TemporaryDirectory() as directory:
        if options.get("output") is None:
            options["output"] = Path(directory) / "answers.jsonl"
        result = _run("generate", GenerateOptions, "runs.generate:run_generation", options)
        lines = Path(options["output"]).read_text(encoding="utf-8").splitlines()
        if Path(options["output"]).parent == Path(directory):
            result["output"] = None
    return Result({**result, "answers": [json.loads(line) for line in lines]})


def compare(*, output_dir: str | Path, **options: Any) -> Result:
    """Train and score several methods on the same rows.

    Args:
        output_dir: Directory of results, report and finished cells.
        options: As of ``lowmem-reft compare``: ``model``, ``data`` and ``eval_data`` as files or as
            rows, ``tasks``, ``methods``, ``seeds``, ...

    Returns:
        What ``compare.matrix.run_comparison`` says: ``rows``, ``report``, ``results``, ...

    Raises:
        InputError: An option, a file or a row is wrong.
    """
    options = {**options, "output_dir": output_dir}
    return Result(_run("compare", CompareOptions, "compare.matrix:run_comparison", options))


def plan(*, model: str, **options: Any) -> Result:
    """Predict the memory of a training; nothing is loaded and no card is needed.

    Args:
        model: Hub id, directory, config.json, or a short name that ``lowmem-reft plan`` knows.
        options: As of ``lowmem-reft plan``: ``gpu`` or ``memory_gib``, ``fit``, ``seq_len``, ...

    Returns:
        What ``memory.verdict.run_plan`` says: ``peak_bytes``, ``fits``, ...

    Raises:
        InputError: The model, the card or the setting is not known or impossible.
    """
    options = {"json": True, **options, "model": model}
    return Result(_run("plan", PlanOptions, "memory.verdict:run_plan", options))


def _run(command: str, kind: Any, handler: str, given: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(given["output_dir"]) if "output_dir" in given else Path(directory)
        leaves = written.leaves(kind)
        own = written.own_names(leaves)
        content = {
            own.get(name, name): _rows_file(folder, name, value) if name in _ROWS else value
            for name, value in given.items()
        }
        content = {name: _checked(command, name, value, leaves) for name, value in content.items()}
        options = written.build(kind, **content)
        quiet = content.get("quiet", False)
        show_bars(not quiet)
        module, _, function = handler.partition(":")
        run = getattr(importlib.import_module(f"lowmem_reft.{module}"), function)
        with without_bars_of_transformers() if quiet else contextlib.nullcontext():
            result: dict[str, Any] = run(options)
        return result


def _rows_file(folder: Path, name: str, value: Any) -> Any:
    """Return a file's name as it is; write rows to a file, and return its name."""
    if value is None or isinstance(value, str | Path):
        return value
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise InputError(
            f"{name} must be a file, a datasets id or a list of rows, got "
            f"{type(value).__name__}; a row is a dictionary in the list"
        )
    lines = []
    for number, row in enumerate(value):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n")
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{name}[{number}] must be a dictionary of texts, numbers and lists, got "
                f"{row!r:.200} ({error}); change it"
            ) from error
    text = "".join(lines)
    # Named by what it holds, so that no other rows are replaced, nor these read as others.
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return str(write_text_whole(folder / f"{name}-{digest}.jsonl", text))


def _checked(command: str, name: str, value: Any, leaves: Mapping[str, written.Leaf]) -> Any:
    """Return a value as the options hold it; refuse what there is not, and what it cannot be."""
    if name not in leaves:
        raise InputError(complaint.no_option(name, command, leaves))
    hint = leaves[name].hint
    if isinstance(value, list | tuple):
        separator = ";" if name == "layers" else ","
        if _is(hint, ""):
            value = separator.join(map(str, value))
        elif _is(hint, ()):
            value = tuple(value)
    if _is(hint, Path()) and isinstance(value, str):
        value = Path(value)
    elif isinstance(value, Path) and not _is(hint, value):
        value = str(value)
    if not _is(hint, value):
        wanted = str(hint).replace("typing.", "").replace("pathlib.", "")
        wanted = hint.__name__ if isinstance(hint, type) else wanted
        raise InputError(f"{name} must be {wanted}, got {value!r}; change it")
    return value


def _is(hint: Any, value: Any) -> bool:
    """Return whether a value is of a type of an option."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_is(each, value) for each in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, origin or hint)
