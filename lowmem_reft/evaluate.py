"""Scoring: accuracy by the likelihood of choices, a classification head, or generated answers."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_reft.adapted import load_adapted
from lowmem_reft.blocks import base_of
from lowmem_reft.data import (
    Collator,
    as_choices,
    class_index,
    encode_choices,
    encode_labelled,
    encode_prompts,
    label_names,
    load_rows,
)
from lowmem_reft.errors import InputError
from lowmem_reft.frozen.prepare import prepare_scoring
from lowmem_reft.generate import generate_batches
from lowmem_reft.loss import response_log_likelihood
from lowmem_reft.options import ReuseOptions
from lowmem_reft.progress import counter, progress
from lowmem_reft.training_card import TrainingCard, find_adapter, load_card, merge_card

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from lowmem_reft.data import Row
    from lowmem_reft.options import EvaluateOptions, Scoring


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """How rows are scored."""

    scoring: Scoring = "auto"
    """likelihood of each choice, or generation; auto: likelihood where rows have choices."""
    answer_pattern: str | None = None
    """Regular expression that finds the answer in generated text; None takes all of it."""
    batch_size: int = 16
    """Sequences per forward pass."""
    max_new_tokens: int = 64
    """Tokens generated per example."""
    quiet: bool = True
    """No progress bar."""
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
    """What may be computed once, and how much it may take on the disk."""
    reuse_dir: Path | None = None
    """Where that is kept; None computes everything anew."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Per-example outcomes of one evaluation."""

    correct: list[bool]
    """Whether each example was answered rightly."""
    predictions: list[Any]
    """What was answered: the index of a choice or class, or the extracted text."""
    losses: list[float] = field(default_factory=list)
    """Mean negative log-likelihood per token of the right choice (or class), where there is one."""
    num_cut_prompts: int = 0
    """Prompts that were cut from the left to fit."""

    def summary(self) -> dict[str, Any]:
        """Return ``accuracy``, ``num_examples`` and, where known, ``loss``."""
        summary: dict[str, Any] = {
            "metric": "accuracy",
            "value": sum(self.correct) / len(self.correct),
            "num_examples": len(self.correct),
            "num_cut_prompts": self.num_cut_prompts,
        }
        summary["accuracy"] = summary["value"]
        if self.losses:
            summary["loss"] = sum(self.losses) / len(self.losses)
        return summary


def run_evaluation(options: EvaluateOptions) -> dict[str, Any]:
    """Score a base, or a base with an adapter, on rows.

    What the command line leaves open (storage, task, template, length, classes) is taken from the
    adapter's training card, so that scoring matches training.

    Returns:
        ``accuracy`` (also as ``metric``, ``value``), ``num_examples``, ``num_cut_prompts`` and,
        where known, ``loss``.

    Raises:
        InputError: an option, a file or a row is wrong.
    """
    adapter = None if options.adapter is None else find_adapter(options.adapter)
    data = options.data
    card = merge_card(
        None if adapter is None else load_card(adapter),
        options.model,
        template=data.template,
        max_length=data.max_length,
    )
    extract_answer("", options.answer_pattern)  # a broken pattern is refused before the work
    if options.predictions is not None:
        options.predictions.parent.mkdir(parents=True, exist_ok=True)
    rows = load_rows(data.data, split=data.split, limit=data.limit)
    if card.label_names is None and rows[0].kind == "label":
        card = replace(card, label_names=label_names(rows))
    check_rows(rows, card)
    model, tokenizer = load_adapted(options.model, adapter, card, resident=options.reuse.resident)
    with ExitStack() as stack:
        directory = options.reuse.reuse_dir
        if directory is None and options.reuse.resident == "upper":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = ScoringSettings(
            scoring=options.scoring,
            answer_pattern=options.answer_pattern,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            quiet=options.quiet,
            reuse=options.reuse,
            reuse_dir=directory,
        )
        scores = score(model, tokenizer, rows, card, settings)
    if options.predictions is not None:
        with options.predictions.open("w") as file:
            for row, prediction, correct in zip(
                rows, scores.predictions, scores.correct, strict=True
            ):
                line = {"source": row.source, "prediction": prediction, "correct": correct}
                file.write(json.dumps(line) + "\n")
    return scores.summary()


def check_rows(rows: Sequence[Row], card: TrainingCard) -> None:
    """Refuse rows that cannot be scored as the card says, before a base is loaded for them.

    Raises:
        InputError: a row has a label that the card does not know, or none for a classifier.
    """
    if card.task_type == "SEQ_CLS":
        for row in rows:
            class_index(row, card.label_names or [])
    else:
        as_choices(rows, card.label_names)


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    settings: ScoringSettings | None = None,
) -> Scores:
    """Score a loaded model on rows; see ``run_evaluation``.

    A base of which only upper blocks are resident is scored from stored constants where rows have
    choices; otherwise its lower blocks are read again for every forward pass.
    """
    settings = settings or ScoringSettings()
    model.eval()
    residency = getattr(base_of(model), "residency", None)
    with nullcontext() if residency is None else residency.streaming():
        return _score(model, tokenizer, rows, card, settings)


def _score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    settings: ScoringSettings,
) -> Scores:
    if card.task_type == "SEQ_CLS":
        return _score_classes(model, tokenizer, rows, card, settings)
    rows = as_choices(rows, card.label_names)
    by_likelihood = settings.scoring == "likelihood" or (
        settings.scoring == "auto" and rows[0].choices
    )
    score_rows = _score_choices if by_likelihood else _score_generated
    return score_rows(model, tokenizer, rows, card, settings)


@torch.no_grad()
def _score_choices(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    settings: ScoringSettings,
) -> Scores:
    """Pick the choice whose tokens have the highest summed log-likelihood after the prompt."""
    encoded = [
        encode_choices(row, tokenizer, template=card.template, max_length=card.max_length)
        for row in rows
    ]
    items = [
        (index, choice, example)
        for index, by_choice in enumerate(encoded)
        for choice, example in enumerate(by_choice.examples)
    ]
    # Like lengths together: little padding.
    items.sort(key=lambda item: -len(item[2]["input_ids"]))
    totals: list[dict[int, tuple[float, int]]] = [{} for _ in rows]
    likelihoods = _likelihoods(model, tokenizer, [example for _, _, example in items], settings)
    starts = range(0, len(items), settings.batch_size)
    for start in progress(starts, "scoring", quiet=settings.quiet):
        batch = items[start : start + settings.batch_size]
        sums, counts = likelihoods(range(start, start + len(batch)))
        for (index, choice, _), total, count in zip(batch, sums.tolist(), counts, strict=True):
            totals[index][choice] = (total, count)
    predictions, losses = [], []
    for row, scored in zip(rows, totals, strict=True):
        assert row.answer is not None
        predictions.append(max(scored, key=lambda choice: scored[choice][0]))
        total, count = scored[row.answer]
        losses.append(-total / count)
    correct = [bool(p == row.answer) for p, row in zip(predictions, rows, strict=True)]
    return Scores(
        correct=correct,
        predictions=predictions,
        losses=losses,
        num_cut_prompts=sum(by_choice.num_cut_prompts for by_choice in encoded),
    )


def _likelihoods(
    model: Any, tokenizer: Any, examples: list[dict[str, Any]], settings: ScoringSettings
) -> Callable[[Sequence[int]], tuple[Tensor, list[int]]]:
    """Return what scores some of the examples: from stored constants if there are any."""
    collate = Collator(tokenizer, padding_side="left")

    def batch_of(indices: Sequence[int]) -> dict[str, Tensor]:
        return collate([examples[index] for index in indices])

    if settings.reuse_dir is not None and hasattr(model, "peft_config"):
        with counter("computing what is constant", quiet=settings.quiet) as report:
            reuse = prepare_scoring(
                model,
                examples,
                batch_of,
                settings.reuse,
                root=settings.reuse_dir,
                batch_size=settings.batch_size,
                report=report,
            )
        if reuse is not None:
            return reuse.log_likelihood
    return lambda indices: response_log_likelihood(model, batch_of(indices))


@torch.no_grad()
def _score_classes(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    settings: ScoringSettings,
) -> Scores:
    """Pick the class with the highest logit of the classification head."""
    assert card.label_names is not None
    encoded = encode_labelled(
        rows, tokenizer, max_length=card.max_length, label_names=card.label_names
    )
    examples, size = encoded.examples, settings.batch_size
    collate = Collator(tokenizer)
    predictions: list[int] = []
    losses: list[float] = []
    for start in progress(range(0, len(examples), size), "scoring", quiet=settings.quiet):
        batch = collate(examples[start : start + size])
        labels = batch.pop("labels")
        logits = model(
            **{key: value.to(model.device) for key, value in batch.items()}
        ).logits.float()
        predictions += logits.argmax(-1).tolist()
        losses += torch.nn.functional.cross_entropy(
            logits, labels.to(logits.device), reduction="none"
        ).tolist()
    correct = [p == example["labels"] for p, example in zip(predictions, examples, strict=True)]
    return Scores(
        correct=correct,
        predictions=predictions,
        losses=losses,
        num_cut_prompts=encoded.num_cut_prompts,
    )


def _score_generated(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    settings: ScoringSettings,
) -> Scores:
    """Generate greedily, extract the answer and compare it with the one in the response."""
    pattern = settings.answer_pattern
    wanted = [extract_answer(row.response or "", pattern) for row in rows]
    for row, answer in zip(rows, wanted, strict=True):
        if answer is None:
            raise InputError(
                f"{row.source}: response must match answer_pattern {pattern!r}, got "
                f"{row.response!r}; correct the pattern or the row"
            )
    encoded = encode_prompts(rows, tokenizer, template=card.template, max_length=card.max_length)
    texts = generate_batches(
        model,
        tokenizer,
        [example["input_ids"] for example in encoded.examples],
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        quiet=settings.quiet,
    )
    predictions = [extract_answer(text, pattern) for text in texts]
    correct = [bool(p == w) for p, w in zip(predictions, wanted, strict=True)]
    return Scores(correct=correct, predictions=predictions, num_cut_prompts=encoded.num_cut_prompts)


def extract_answer(text: str, pattern: str | None) -> str | None:
    """Return the last match's first group (or the whole text), lower-cased, white space folded.

    Args:
        text: generated or reference text.
        pattern: regular expression; None takes the whole text.

    Returns:
        The answer, or None if the pattern does not match.

    Raises:
        InputError: the pattern is not a regular expression.
    """
    if pattern is not None:
        try:
            matches = list(re.finditer(pattern, text))
        except re.error as error:
            raise InputError(
                f"answer_pattern must be a regular expression, got {pattern!r}; mend it ({error})"
            ) from error
        if not matches:
            return None
        text = matches[-1][1] if matches[-1].re.groups else matches[-1][0]
    return " ".join((text or "").lower().split())
