"""EleutherAI's lm-eval on an adapted model: its tasks and metrics, our forward pass.

The harness hands context and continuation to the model as one text without a mask. An adapter that
edits prompt tokens would take both for the prompt, so contexts are marked as such here: what is
edited is what is edited in training and in ``evaluate``.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from typing import TYPE_CHECKING, Any
from unittest import mock

from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from lowmem_reft.errors import InputError
from lowmem_reft.machine.contracts import check_versions
from lowmem_reft.machine.files import write_text_whole
from lowmem_reft.methods.loading import load_adapted
from lowmem_reft.options import CHAT_TEMPLATE
from lowmem_reft.runs.harness_model import AdaptedModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from lowmem_reft.methods.card import TrainingCard
    from lowmem_reft.options import EvaluateOptions

logger = logging.getLogger(__name__)


def run_harness(
    options: EvaluateOptions, adapter: Path | None, card: TrainingCard
) -> dict[str, Any]:
    """Score a base, or a base with an adapter, on tasks of the harness.

    Returns:
        ``results`` (for each task its metrics, by the harness's names), ``groups`` (the same for
        each group of tasks), ``task_versions``, ``num_fewshot`` and ``num_examples`` by task,
        ``num_cut_contexts`` (of likelihood requests, cut from the left) and ``lm_eval_version``.

    Raises:
        InputError: An option is wrong, or a task or its rows cannot be found.
    """
    if card.task_type != "CAUSAL_LM":
        raise InputError(
            f"task_type must be CAUSAL_LM with --lm-eval, got {card.task_type!r}; a classifier is "
            "scored on --data"
        )
    check_versions("eval")
    assert options.harness.lm_eval is not None
    with _bars(shown=not options.quiet and sys.stderr.isatty()), _notices_hidden():
        names = [name.strip() for name in options.harness.lm_eval.split(",")]
        manager = _task_manager(names, options.harness.include_path, quiet=options.quiet)
        tasks = [task for name in names for task in _load_task(name, manager)]
        if card.template == CHAT_TEMPLATE and not options.harness.apply_chat_template:
            logger.warning(
                "the adapter was trained through the chat template, and the tasks' prompts are "
                "written without it; add --apply-chat-template"
            )
        model, tokenizer = load_adapted(options.model, adapter, card)
        lm = AdaptedModel(
            model,
            tokenizer,
            batch_size=options.batch_size,
            chats=options.harness.apply_chat_template,
            quiet=options.quiet,
        )
        found: Any = simple_evaluate(
            lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.harness.num_fewshot,
            limit=options.data.limit,
            apply_chat_template=options.harness.apply_chat_template,
            log_samples=options.predictions is not None,
        )
    if options.predictions is not None:
        _write_samples(found["samples"], options.predictions)
    result = _summary(found) | {"num_cut_contexts": lm.num_cut_contexts}
    _print(result)
    return result


def _task_manager(names: Sequence[str], include_path: Path | None, *, quiet: bool) -> TaskManager:
    """Return what knows the tasks: those of the directory alone if they are all that is needed.

    The harness's own, ten thousand files, are read for their names, which takes seconds.
    """
    own = None if include_path is None else str(include_path)
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    if not quiet:
        print("reading the list of the harness's tasks", file=sys.stderr)
    return TaskManager(include_path=own)


def _load_task(name: str, manager: TaskManager) -> list[Any]:
    """Build a task, a group or the tasks of a tag, with their rows."""
    if name not in manager.all_tasks:
        raise InputError(
            f"lm_eval must name tasks of the harness or of --include-path, got {name!r}; "
            "`lm-eval ls tasks` lists its own"
        )
    try:
        loaded = manager.load(name)
    except Exception as error:  # of datasets, yaml, jinja, or the task's own code
        raise InputError(
            f"lm_eval must name tasks that can be loaded, got {name!r}: "
            f"{str(error).splitlines()[0]}; mend it or its rows"
        ) from error
    groups = loaded["groups"]
    return [groups[name]] if name in groups else list(loaded["tasks"].values())


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return what the harness measured, without its record of the machine."""
    results, groups = (
        {name: _without_texts(entry) for name, entry in found.get(kind, {}).items()}
        for kind in ("results", "groups")
    )
    return {
        "results": results,
        "groups": groups,
        "task_versions": found["versions"],
        "num_fewshot": found["n-shot"],
        "num_examples": {name: count["effective"] for name, count in found["n-samples"].items()},
        "lm_eval_version": metadata.version("lm_eval"),
    }


def _without_texts(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: entry[key] for key in entry if key not in ("alias", "name", "sample_len")}


def _print(result: dict[str, Any]) -> None:
    """Print a line per metric; with ``--json`` standard output is elsewhere by now."""
    justified: dict[str, Any] = {"task": "left", "metric": "left", "value": "right"}
    columns: Any = [Column(n, justify=side, no_wrap=True) for n, side in justified.items()]
    table = Table(*columns, box=None, pad_edge=False)
    for kind in ("results", "groups"):
        for task, metrics in result[kind].items():
            for metric, value in metrics.items():
                table.add_row(task, metric, f"{value:.4f}" if type(value) is float else str(value))
    Console(width=max(80, Console().width), markup=False).print(table)


def _write_samples(samples: dict[str, list[Any]], path: Path) -> None:
    """Write one line per example: what was asked, answered and right, as the harness keeps it."""
    lines = (
        json.dumps({"task": task, **example}, default=str) + "\n"
        for task, examples in samples.items()
        for example in examples
    )
    write_text_whole(path, "".join(lines))


def _bars(*, shown: bool) -> AbstractContextManager[Any]:
    """Keep the harness's own progress bars off what is no terminal."""
    start = tqdm.__init__

    def start_hidden(bar: Any, *args: Any, **options: Any) -> None:
        start(bar, *args, **{**options, "disable": True})

    return nullcontext() if shown else mock.patch.object(tqdm, "__init__", start_hidden)


@contextmanager
def _notices_hidden() -> Iterator[None]:
    """Keep notices off the terminal that are about how the harness itself would load a model.

    And git's complaint about a directory that is none of its own: the harness asks it for a commit.
    """
    harness = logging.getLogger("lm_eval")
    before = harness.level
    harness.setLevel(logging.ERROR)
    try:
        with mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None):
            yield
    finally:
        harness.setLevel(before)
