"""EleutherAI's lm-eval on an adapted model: its tasks and metrics, our forward pass.

The harness hands context and continuation to the model as one text without a mask. An adapter that
edits prompt tokens would take both for the prompt, so contexts are marked as such here: what is
edited is what is edited in training and in ``evaluate``.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Column, Table
from tqdm import tqdm

from lowmem_reft.base.blocks import base_of, device_of
from lowmem_reft.base.limits import Limits
from lowmem_reft.data import IGNORED_LABEL
from lowmem_reft.data.ends import end_ids
from lowmem_reft.data.texts import up_to_answer
from lowmem_reft.data.tokens import Collator, encode_texts
from lowmem_reft.errors import InputError
from lowmem_reft.machine.contracts import check_versions
from lowmem_reft.machine.files import write_text_whole
from lowmem_reft.machine.progress import progress
from lowmem_reft.methods.likelihood import check_finite
from lowmem_reft.methods.loading import load_adapted
from lowmem_reft.methods.virtual_tokens import (
    embeds_virtual_tokens,
    generate,
    num_virtual_tokens,
    with_virtual_tokens,
)
from lowmem_reft.options import CHAT_TEMPLATE
from lowmem_reft.reft.tuner import prompt_arguments, reft_configs

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from lowmem_reft.methods.card import TrainingCard
    from lowmem_reft.options import EvaluateOptions

logger = logging.getLogger(__name__)

Request = tuple[tuple[str, str], list[int], list[int]]
"""Both texts, the context's tokens, the continuation's tokens: as the harness passes them. Parts of
texts that are scored whole come without texts."""

Scored = tuple[tuple[int, ...], tuple[int, ...], int]
"""The prompt's tokens, those that follow it, and of how many the next ones are scored."""


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


class AdaptedModel(HFLM):  # type: ignore[misc]  # the harness ships no types
    """The harness's view of a model of ours, which tells context from continuation.

    The model is in evaluation mode, with or without an adapter. ``chats`` tells whether the tasks'
    prompts are written by the tokenizer's chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        batch_size: int,
        chats: bool = False,
        quiet: bool = True,
    ) -> None:
        super().__init__(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size
        )
        self._ends = end_ids(tokenizer, chats=chats)
        bos = tokenizer("")["input_ids"][:1]
        # Chat templates write their own BOS or none, as in training.
        self._start = bos if bos == [tokenizer.bos_token_id] and not chats else []
        self.limits = Limits.of(model, tokenizer)
        positions = self.limits.num_positions or self.max_length
        self._max_length = min(self.max_length, positions) - num_virtual_tokens(model)
        self.quiet = quiet
        self.num_cut_contexts = 0

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a chat as its template writes it, for generation as in training."""
        text = str(super().apply_chat_template(chat_history, add_generation_prompt))
        if not add_generation_prompt:
            return text
        return up_to_answer(text, self.tokenizer, chat_history, source="a task")

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[int]:
        """Return the tokens of a text as training has them: after one BOS if there is to be one."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        start = [] if add_special_tokens is False or ids[:1] == self._start else self._start
        if left_truncate_len is not None:
            ids = ids[max(0, len(start) + len(ids) - left_truncate_len) :]
        return start + ids

    def tok_batch_encode(
        self, strings: list[str], left_truncate_len: int | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the tokens and the mask of prompts, left-padded: those of ``encode_prompts``."""
        size = left_truncate_len
        rows = [self.tok_encode(text.rstrip(" "), left_truncate_len=size) for text in strings]
        batch = Collator(self.tokenizer, padding_side="left")([{"input_ids": ids} for ids in rows])
        return batch["input_ids"], batch["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both, as of a prompt and its response in training.

        Raises:
            InputError: One of them has no token of its own.
        """
        ((ids, rest),) = encode_texts(
            [(context, continuation)],
            self.tokenizer,
            adds_bos=bool(self._start),
            source=_named((context, continuation)),
        )
        if not ids:
            raise InputError(
                f"a context must have a token of its own, got {context[-40:]!r} before "
                f"{continuation[:40]!r}; leave the task out"
            )
        return ids, rest

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return for each request the continuation's log-likelihood, and whether it is greedy.

        The order is that of the requests. Continuations that differ in their last token share a
        forward pass, as one-letter choices do.
        """
        self.limits.check(
            [_named(texts) for texts, _, _ in requests],
            [[*context, *continuation] for _, context, continuation in requests],
            cut=True,
        )
        sharing: dict[Scored, list[int]] = {}
        for index, (texts, context, continuation) in enumerate(requests):
            prompt, rest = tuple(self._cut(context, continuation)), tuple(continuation[:-1])
            key = ((), prompt + rest) if texts is None else (prompt, rest)
            sharing.setdefault((*key, len(continuation)), []).append(index)
        # Like lengths together: little padding; the longest first: too little memory shows at once.
        groups = sorted(sharing.items(), key=lambda item: -len(item[0][0]) - len(item[0][1]))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        size = override_bs or int(self.batch_size)
        starts = range(0, len(groups), size)
        for start in progress(starts, "scoring", quiet=self.quiet or disable_tqdm):
            batch = groups[start : start + size]
            logits = self._last_logits([scored for scored, _ in batch])
            for row, ((_, _, num_scored), indices) in zip(logits, batch, strict=True):
                predicted = row[len(row) - num_scored :].float().log_softmax(-1)
                greedy = predicted.argmax(-1)
                for index in indices:
                    wanted = torch.tensor(requests[index][2], device=row.device)
                    total = predicted.gather(1, wanted[:, None]).sum()
                    check_finite([float(total)], f"request {index + 1}")
                    answers[index] = (float(total), bool((greedy == wanted).all()))
        return answers

    def _cut(self, context: list[int], continuation: list[int]) -> list[int]:
        """Return the last tokens of the context that fit: the last of the whole is not read."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise InputError(
                f"a continuation must leave room for its context in {self.max_length} tokens, got "
                f"{len(continuation)}; leave the task out"
            )
        self.num_cut_contexts += len(context) > room
        return context[-room:]

    @torch.no_grad()
    def _last_logits(self, sequences: Sequence[Scored]) -> Tensor:
        """Return the logits of the last tokens of left-padded sequences, (batch, scored, vocab).

        There are as many as any of the sequences needs.
        """
        num_scored = max(count for _, _, count in sequences)
        examples = [
            {"input_ids": [*prompt, *rest], "labels": [*[IGNORED_LABEL] * len(prompt), *rest]}
            for prompt, rest, _ in sequences
        ]
        batch = Collator(self.tokenizer, padding_side="left")(examples)
        names, device = ("input_ids", "attention_mask", "labels"), device_of(self.model)
        ids, mask, labels = (batch[name].to(device) for name in names)
        base = base_of(self.model)
        known = inspect.signature(base.forward).parameters
        if embeds_virtual_tokens(self.model):
            model, inputs = base, with_virtual_tokens(self.model, ids, mask)
        else:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            model, inputs = self.model, {"input_ids": ids, "attention_mask": mask}
            inputs |= {"position_ids": positions, **prompt_arguments(model, labels)}
        if "position_ids" not in known:
            del inputs["position_ids"]
        kept = {"logits_to_keep": num_scored} if "logits_to_keep" in known else {}
        logits: Tensor = model(**inputs, **kept, use_cache=False).logits
        return logits[:, -num_scored:]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihoods of whole texts: they have no prompt, and are edited as answers."""
        if not all(config.where.response for config in reft_configs(self.model)):
            logger.warning(
                "tasks that score whole texts have no prompt, so the adapter edits nothing there"
            )
        rolled: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return rolled

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, cut from the left to fit.

        Raises:
            InputError: A context has a token without an embedding, or has no room at all.
        """
        contexts = [request.args[0] for request in requests]
        ids = [self.tok_encode(context) for context in contexts]
        self.limits.check([_named((context, "")) for context in contexts], ids, cut=True)
        for request in requests:
            new = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if new >= self.max_length:
                raise InputError(
                    f"a task's max_gen_toks must leave room for a context in the base's "
                    f"{self.max_length} positions, got {new}; leave the task out"
                )
        written: list[str] = super().generate_until(requests, disable_tqdm)
        return written

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        """Continue left-padded contexts; return them with what is new.

        What a task does not say is not taken from the base's own ``generation_config``.
        """
        size = context.shape[1]
        # Of prompts that are embeddings, transformers shows the new tokens alone.
        num_before = 0 if embeds_virtual_tokens(self.model) else size
        if not options.setdefault("do_sample", False):
            options.pop("temperature", None)
        new = generate(
            self.model,
            {"input_ids": context, "attention_mask": options.pop("attention_mask")},
            max_new_tokens=max_length - size,
            stopping_criteria=stop_sequences_criteria(
                self.tokenizer, stop, num_before, len(context)
            ),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self._ends or None,
            use_cache=True,
            **options,
        )
        for end in self._ends:  # an end need not be special, and is no text
            new[new == end] = self.tokenizer.pad_token_id
        return torch.cat([context, new], 1)

    def get_model_info(self) -> dict[str, Any]:
        """Return nothing: the harness would ask the hub for a model that is in memory."""
        return {}


def _named(texts: tuple[str, str] | None) -> str:
    """Return how a message names a request."""
    return "a text" if texts is None else f"the context that ends in {texts[0][-40:]!r}"


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
