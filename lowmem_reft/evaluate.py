"""Scoring: accuracy by the likelihood of choices, a classification head, or generated answers."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowmem_reft.adapted import load_adapted
from lowmem_reft.data import (
    Collator,
    as_choices,
    encode_choices,
    encode_labelled,
    encode_prompt,
    encode_rows,
    label_names,
    load_rows,
)
from lowmem_reft.errors import InputError, check_counts
from lowmem_reft.generate import generate_batches
from lowmem_reft.progress import progress
from lowmem_reft.training_card import TrainingCard, find_adapter, load_card
from lowmem_reft.tuner import prompt_arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lowmem_reft.data import Row
    from lowmem_reft.options import EvaluateOptions


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

    What the command line leaves open (storage, template, classes) is taken from the adapter's
    training card, so that scoring matches training.

    Returns:
        ``accuracy`` (also as ``metric``, ``value``), ``num_examples``, ``num_cut_prompts`` and,
        where known, ``loss``.

    Raises:
        InputError: an option, a file or a row is wrong.
    """
    adapter = None if options.adapter is None else find_adapter(options.adapter)
    card = _card(options, None if adapter is None else load_card(adapter))
    given = (options.data.eval_limit, options.data.limit)
    limit = next((value for value in given if value is not None), None)
    check_counts(batch_size=options.batch_size, max_new_tokens=options.max_new_tokens)
    extract_answer("", options.answer_pattern)  # a broken pattern is refused before the work
    if options.predictions is not None:
        options.predictions.parent.mkdir(parents=True, exist_ok=True)
    rows = load_rows(options.data.data, split=options.data.split, limit=limit)
    if card.label_names is None and rows[0].kind == "label":
        card = replace(card, label_names=label_names(rows))
    model, tokenizer = load_adapted(options.model, adapter, card)
    scores = score(
        model,
        tokenizer,
        rows,
        card,
        scoring=options.scoring,
        answer_pattern=options.answer_pattern,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        quiet=options.quiet,
    )
    if options.predictions is not None:
        with options.predictions.open("w") as file:
            for row, prediction, correct in zip(
                rows, scores.predictions, scores.correct, strict=True
            ):
                line = {"source": row.source, "prediction": prediction, "correct": correct}
                file.write(json.dumps(line) + "\n")
    return scores.summary()


def score(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    *,
    scoring: str = "auto",
    answer_pattern: str | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    quiet: bool = True,
) -> Scores:
    """Score a loaded model on rows; see ``run_evaluation``."""
    model.eval()
    if card.task_type == "SEQ_CLS":
        return _score_classes(model, tokenizer, rows, card, batch_size, quiet)
    rows = as_choices(rows, card.label_names)
    if scoring == "auto":
        scoring = "likelihood" if rows[0].choices else "generation"
    if scoring == "likelihood":
        scores = _score_choices(model, tokenizer, rows, card, batch_size, quiet)
    else:
        scores = _score_generated(
            model, tokenizer, rows, card, answer_pattern, batch_size, max_new_tokens, quiet
        )
    encoded = encode_rows(rows, tokenizer, template=card.template, max_length=card.max_length)
    return replace(scores, num_cut_prompts=encoded.num_cut_prompts)


def _card(options: EvaluateOptions, trained: TrainingCard | None) -> TrainingCard:
    """Merge the training card with what the command line says."""
    given: dict[str, Any] = {}
    if options.model.storage is not None:
        given["storage"] = options.model.storage
    if options.model.compute_dtype != "auto":
        given["compute_dtype"] = options.model.compute_dtype
    if options.data.template is not None:
        given["template"] = options.data.template
    if trained is None:
        given.setdefault("storage", "nf4")
        return TrainingCard(
            base=options.model.model,
            task_type=options.model.task_type,
            max_length=options.data.max_length,
            **given,
        )
    return replace(trained, **given)


@torch.no_grad()
def _score_choices(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    batch_size: int,
    quiet: bool,
) -> Scores:
    """Pick the choice whose tokens have the highest summed log-likelihood after the prompt."""
    items = [
        (index, choice, example)
        for index, row in enumerate(rows)
        for choice, example in enumerate(
            encode_choices(row, tokenizer, template=card.template, max_length=card.max_length)
        )
    ]
    # Like lengths together: little padding.
    items.sort(key=lambda item: -len(item[2]["input_ids"]))
    totals: list[dict[int, tuple[float, int]]] = [{} for _ in rows]
    collate = Collator(tokenizer, padding_side="left")
    starts = range(0, len(items), batch_size)
    for start in progress(starts, "scoring", quiet=quiet):
        batch = items[start : start + batch_size]
        sums, counts = _response_log_likelihood(
            model, collate([example for _, _, example in batch])
        )
        for (index, choice, _), total, count in zip(batch, sums, counts, strict=True):
            totals[index][choice] = (total, count)
    predictions, losses = [], []
    for row, by_choice in zip(rows, totals, strict=True):
        assert row.answer is not None
        predictions.append(max(by_choice, key=lambda choice: by_choice[choice][0]))
        total, count = by_choice[row.answer]
        losses.append(-total / count)
    correct = [bool(p == row.answer) for p, row in zip(predictions, rows, strict=True)]
    return Scores(correct=correct, predictions=predictions, losses=losses)


def _response_log_likelihood(model: Any, batch: dict[str, Tensor]) -> tuple[list[float], list[int]]:
    """Return the summed log-likelihood of the supervised tokens of each example, and their number.

    The batch is left-padded, so only the last positions need logits.
    """
    labels = batch.pop("labels")
    batch = {key: value.to(model.device) for key, value in batch.items()}
    kept = int((labels != -100).sum(1).max())
    if "position_ids" in inspect.signature(_base_of(model).forward).parameters:
        # Absolute positions (GPT-2) count from the first token, not from the padding.
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(
        **batch, **prompt_arguments(model, labels), logits_to_keep=kept + 1, use_cache=False
    ).logits  # (batch, kept + 1, vocab)
    targets = labels[:, -kept:].to(logits.device)
    # Models that do not know logits_to_keep give all positions.
    log_probs = logits[:, -kept - 1 : -1].float().log_softmax(-1)
    supervised = targets != -100
    picked = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * supervised
    return picked.sum(1).tolist(), supervised.sum(1).tolist()


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def _score_classes(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    batch_size: int,
    quiet: bool,
) -> Scores:
    """Pick the class with the highest logit of the classification head."""
    assert card.label_names is not None
    examples = encode_labelled(
        rows, tokenizer, max_length=card.max_length, label_names=card.label_names
    ).examples
    collate = Collator(tokenizer)
    predictions: list[int] = []
    losses: list[float] = []
    for start in progress(range(0, len(examples), batch_size), "scoring", quiet=quiet):
        batch = collate(examples[start : start + batch_size])
        labels = batch.pop("labels")
        logits = model(
            **{key: value.to(model.device) for key, value in batch.items()}
        ).logits.float()
        predictions += logits.argmax(-1).tolist()
        losses += torch.nn.functional.cross_entropy(
            logits, labels.to(logits.device), reduction="none"
        ).tolist()
    correct = [p == example["labels"] for p, example in zip(predictions, examples, strict=True)]
    return Scores(correct=correct, predictions=predictions, losses=losses)


def _score_generated(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    answer_pattern: str | None,
    batch_size: int,
    max_new_tokens: int,
    quiet: bool,
) -> Scores:
    """Generate greedily, extract the answer and compare it with the one in the response."""
    prompts = [
        encode_prompt(row, tokenizer, template=card.template, max_length=card.max_length)
        for row in rows
    ]
    texts = generate_batches(
        model, tokenizer, prompts, batch_size=batch_size, max_new_tokens=max_new_tokens, quiet=quiet
    )
    predictions = [extract_answer(text, answer_pattern) for text in texts]
    wanted = [extract_answer(row.response or "", answer_pattern) for row in rows]
    for row, answer in zip(rows, wanted, strict=True):
        if answer is None:
            raise InputError(
                f"{row.source}: response must match answer_pattern {answer_pattern!r}, got "
                f"{row.response!r}; correct the pattern or the row"
            )
    correct = [bool(p == w) for p, w in zip(predictions, wanted, strict=True)]
    return Scores(correct=correct, predictions=predictions)


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
