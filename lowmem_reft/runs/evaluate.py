"""Scoring: by the likelihood of choices, a classification head, or generated answers.

Each way gives a prediction per example; the metric (``metrics.py``) makes one number of them.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import re
import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_reft.base.blocks import base_of
from lowmem_reft.data.rows import as_choices, class_index, label_names, load_rows
from lowmem_reft.data.tasks.answers import answers_equal, find_extractor
from lowmem_reft.data.tasks.metrics import compute, find_metric
from lowmem_reft.data.tokens import (
    Collator,
    encode_choices,
    encode_labelled,
    encode_prompts,
    encode_rows,
)
from lowmem_reft.errors import InputError, is_out_of_memory
from lowmem_reft.machine.progress import counter, progress
from lowmem_reft.methods.card import TrainingCard, find_adapter, load_card, merge_card
from lowmem_reft.methods.likelihood import response_log_likelihood
from lowmem_reft.methods.loading import load_adapted
from lowmem_reft.options import ReuseOptions, ScoringOptions
from lowmem_reft.reuse.prepare import prepare
from lowmem_reft.runs.generate import generate_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from lowmem_reft.data.rows import Row
    from lowmem_reft.options import EvaluateOptions
    from lowmem_reft.reuse.reuse import Reuse


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(ScoringOptions):
    """How rows are scored, and with what means."""

    batch_size: int = 16
    """Sequences per forward pass."""
    quiet: bool = True
    """No progress bar."""
    reuse: ReuseOptions = field(default_factory=ReuseOptions)
    """What may be computed once, and how much it may take on the disk."""
    reuse_dir: Path | None = None
    """Where that is kept; None computes everything anew."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Per-example outcomes of one evaluation."""

    predictions: list[Any]
    """What was answered: the index of a choice or class, a number, or the extracted text."""
    references: list[Any]
    """What is right, in the same form."""
    correct: list[bool]
    """Whether each example was answered rightly."""
    losses: list[float] = field(default_factory=list)
    """Mean negative log-likelihood per token of the right answer (or class), where it is known."""
    num_cut_prompts: int = 0
    """Prompts that were cut from the left to fit."""
    texts: list[str] = field(default_factory=list)
    """What was generated, where answers were."""
    metric: str = "accuracy"
    """What ``value`` is; a name in ``tasks.metrics.METRICS``."""
    extra_metrics: str | None = None
    """Comma-separated further ones."""
    reuse: Reuse | None = None
    """What scored the rows from stored constants, if something did."""

    @property
    def value(self) -> float:
        """The metric over all examples: a share (accuracy, f1, ...) or a correlation."""
        return self._computed(self.metric)

    def _computed(self, metric: str) -> float:
        if metric == "accuracy":
            return sum(self.correct) / len(self.correct)
        return compute(metric, self.predictions, self.references)

    def summary(self) -> dict[str, Any]:
        """Return ``metric``, ``value``, ``accuracy``, ``num_examples`` and, if known, ``loss``."""
        summary: dict[str, Any] = {
            "metric": self.metric,
            "value": self.value,
            "accuracy": sum(self.correct) / len(self.correct),
            "num_examples": len(self.correct),
            "num_cut_prompts": self.num_cut_prompts,
        }
        if self.extra_metrics is not None:
            names = map(str.strip, self.extra_metrics.split(","))
            summary["extra"] = {name: self._computed(name) for name in names}
        if self.losses:
            summary["loss"] = sum(self.losses) / len(self.losses)
        if self.reuse is not None:
            summary["reuse"] = self.reuse.mode
            summary["store_bytes"] = self.reuse.layout.total_bytes
            summary["build_time_s"] = self.reuse.build_time_s
        return summary


def run_evaluation(options: EvaluateOptions) -> dict[str, Any]:
    """Score a base, or a base with an adapter, on rows.

    What the command line leaves open (storage, task, template, length, classes) is taken from the
    adapter's training card, so that scoring matches training.

    Returns:
        ``metric``, ``value``, ``accuracy`` (the share of right answers), ``extra`` (of
        ``extra_metrics``, by name), ``num_examples``, ``storage``,
        ``num_cut_prompts``, where known ``loss`` and, where stored constants were used, ``reuse``,
        ``store_bytes`` and ``build_time_s``. Where the adapter was trained on another storage also
        ``trained_storage``, ``value_trained_storage``, ``accuracy_trained_storage`` and
        ``loss_trained_storage``. With ``--lm-eval`` see ``harness.run_harness``.

    Raises:
        InputError: an option, a file or a row is wrong.
    """
    adapter = None if options.adapter is None else find_adapter(options.adapter)
    data = options.data
    trained = None if adapter is None else load_card(adapter)
    card = merge_card(
        trained,
        options.model,
        template=data.template,
        max_length=data.max_length,
    )
    check_scoring(options.scoring)
    if options.predictions is not None:
        options.predictions.parent.mkdir(parents=True, exist_ok=True)
    if options.harness.lm_eval is not None:
        from lowmem_reft.runs.harness import run_harness  # it needs an optional package

        return run_harness(options, adapter, card)
    rows = load_rows(data.data, split=data.split, limit=data.limit)
    if card.label_names is None and rows[0].kind == "label":
        card = replace(card, label_names=label_names(rows))
    check_rows(rows, card)
    scores = _load_and_score(options, adapter, card, rows)
    if scores.reuse is None and options.reuse.reuse in ("prefix", "trunk"):
        logger.warning(
            "reuse %s has no effect: it needs --reuse-dir, an adapter and rows with choices",
            options.reuse.reuse,
        )
    if options.predictions is not None:
        with options.predictions.open("w", encoding="utf-8") as file:
            for line in _prediction_lines(rows, scores, card):
                file.write(json.dumps(line) + "\n")
    summary = scores.summary() | {"storage": card.storage}
    if (
        trained is not None
        and trained.storage not in (None, card.storage)
        and not options.only_given_storage
    ):
        own = replace(card, storage=trained.storage, compute_dtype=trained.compute_dtype)
        summary |= _score_as_trained(options, adapter, own, rows)
    return summary


def _score_as_trained(
    options: EvaluateOptions, adapter: Path | None, card: TrainingCard, rows: Sequence[Row]
) -> dict[str, Any]:
    """Score again on a base that is stored as in the training."""
    logger.warning(
        "scoring on %s as well, as in the training; --only-given-storage leaves that out",
        card.storage,
    )
    gc.collect()  # the first model, before there is a second one
    try:
        summary = _load_and_score(options, adapter, card, rows).summary()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        logger.warning("not scored on %s: out of memory (%s)", card.storage, error)
        summary = {}
    names = ("value", "accuracy", "loss")
    scores = {f"{name}_trained_storage": summary[name] for name in names if name in summary}
    return {"trained_storage": card.storage, **scores}


def _load_and_score(
    options: EvaluateOptions, adapter: Path | None, card: TrainingCard, rows: Sequence[Row]
) -> Scores:
    model, tokenizer = load_adapted(options.model, adapter, card, resident=options.reuse.resident)
    if adapter is None and card.task_type == "SEQ_CLS" and model.has_new_head:
        logger.warning(
            "%s has no classification head: it got a new one, of random weights, and its scores "
            "say nothing; give the --adapter that was trained with one",
            options.model.model,
        )
    with ExitStack() as stack:
        directory = options.reuse.reuse_dir
        if directory is None and options.reuse.resident == "upper":
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        settings = ScoringSettings(
            **vars(options.scoring),
            batch_size=options.batch_size,
            quiet=options.quiet,
            reuse=options.reuse,
            reuse_dir=directory,
        )
        return score(model, tokenizer, rows, card, settings)


def _prediction_lines(
    rows: Sequence[Row], scores: Scores, card: TrainingCard
) -> Iterator[dict[str, Any]]:
    """What is written per example: where it is from, what was asked, answered and right."""
    texts: Sequence[str | None] = scores.texts or [None] * len(rows)
    for row, prediction, reference, correct, text in zip(
        rows, scores.predictions, scores.references, scores.correct, texts, strict=True
    ):
        line = {
            "source": row.source,
            "prompt": row.prompt or row.prompt_messages[-1]["content"],
            "prediction": prediction,
            "reference": reference,
            "correct": correct,
        }
        names = row.choices or card.label_names or ()
        if type(prediction) is int and names:
            line["prediction_text"], line["reference_text"] = names[prediction], names[reference]
        elif text is not None:
            line["prediction_text"], line["reference_text"] = text, row.response
        yield line


def check_scoring(options: ScoringOptions) -> None:
    """Refuse a metric, an extractor or a pattern that there is not, before the work.

    Raises:
        InputError: see above.
    """
    for name in (options.metric, *filter(None, (options.extra_metrics or "").split(","))):
        find_metric(name.strip())
    if options.extractor is not None:
        find_extractor(options.extractor)
    extract_answer("", options.answer_pattern)


def check_rows(rows: Sequence[Row], card: TrainingCard) -> None:
    """Refuse rows that cannot be scored as the card says, before a base is loaded for them.

    Raises:
        InputError: a row has a label that the card does not know, or none for a classifier.
    """
    if card.regression:
        for row in rows:
            if row.target is None:
                raise InputError(
                    f"{row.source}: a row must have text and target, as in the training, got a "
                    f"{row.kind} row; convert the file"
                )
    elif card.task_type == "SEQ_CLS":
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
        scores = _score_classes(model, tokenizer, rows, card, settings)
        return replace(scores, metric=settings.metric, extra_metrics=settings.extra_metrics)
    rows = as_choices(rows, card.label_names)
    by_likelihood = settings.scoring == "likelihood" or (
        settings.scoring == "auto" and rows[0].choices
    )
    score_rows = _score_choices if by_likelihood else _score_generated
    scores = score_rows(model, tokenizer, rows, card, settings)
    return replace(scores, metric=settings.metric, extra_metrics=settings.extra_metrics)


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
    reuse, likelihoods = _likelihoods(
        model, tokenizer, [example for _, _, example in items], settings
    )
    starts = range(0, len(items), settings.batch_size)
    for start in progress(starts, "scoring", quiet=settings.quiet):
        batch = items[start : start + settings.batch_size]
        sums, counts = likelihoods(range(start, start + len(batch)))
        for (index, choice, _), total, count in zip(batch, sums.tolist(), counts, strict=True):
            totals[index][choice] = (total, count)
    answers, losses = [], []
    for row, scored in zip(rows, totals, strict=True):
        assert row.answer is not None
        answers.append(max(scored, key=lambda choice: scored[choice][0]))
        total, count = scored[row.answer]
        losses.append(-total / count)
    predictions: list[Any] = answers
    references: list[Any] = [row.answer for row in rows]
    if rows[0].target is not None:
        predictions = [_expected(row, scored) for row, scored in zip(rows, totals, strict=True)]
        references = [row.target for row in rows]
    return Scores(
        correct=[answer == row.answer for answer, row in zip(answers, rows, strict=True)],
        predictions=predictions,
        references=references,
        losses=losses,
        num_cut_prompts=sum(by_choice.num_cut_prompts for by_choice in encoded),
        reuse=reuse,
    )


def _expected(row: Row, scored: dict[int, tuple[float, int]]) -> float:
    """The choices are numbers: their mean under the softmax of their log-likelihoods."""
    top = max(total for total, _ in scored.values())
    weights = {choice: math.exp(total - top) for choice, (total, _) in scored.items()}
    weighted = sum(weight * float(row.choices[choice]) for choice, weight in weights.items())
    return weighted / sum(weights.values())


def _likelihoods(
    model: Any, tokenizer: Any, examples: list[dict[str, Any]], settings: ScoringSettings
) -> tuple[Reuse | None, Callable[[Sequence[int]], tuple[Tensor, list[int]]]]:
    """Return what scores some of the examples: from stored constants (also returned) if any."""
    collate = Collator(tokenizer, padding_side="left")

    if settings.reuse_dir is not None and hasattr(model, "peft_config"):
        with counter("computing what is constant", quiet=settings.quiet) as report:
            reuse = prepare(
                model,
                examples,
                collate,
                settings.reuse,
                root=settings.reuse_dir,
                batch_size=settings.batch_size,
                epochs=None,
                report=report,
            )
        if reuse is not None:
            return reuse, reuse.log_likelihood
    return None, lambda indices: response_log_likelihood(
        model, collate([examples[index] for index in indices])
    )


@torch.no_grad()
def _score_classes(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    settings: ScoringSettings,
) -> Scores:
    """Pick the class with the highest logit of the head; of one output, take its value."""
    encoded = encode_labelled(
        rows, tokenizer, max_length=card.max_length, label_names=card.label_names
    )
    examples, size = encoded.examples, settings.batch_size
    collate = Collator(tokenizer)
    predictions: list[Any] = []
    losses: list[float] = []
    for start in progress(range(0, len(examples), size), "scoring", quiet=settings.quiet):
        batch = collate(examples[start : start + size])
        labels = batch.pop("labels").to(model.device)
        logits = model(
            **{key: value.to(model.device) for key, value in batch.items()}
        ).logits.float()
        if logits.shape[-1] == 1:  # a regression
            predictions += logits[:, 0].tolist()
            losses += (logits[:, 0] - labels).square().tolist()
        else:
            predictions += logits.argmax(-1).tolist()
            losses += torch.nn.functional.cross_entropy(logits, labels, reduction="none").tolist()
    references = [example["labels"] for example in examples]
    return Scores(
        correct=[p == r for p, r in zip(predictions, references, strict=True)],
        predictions=predictions,
        references=references,
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
    references = [_answer(row.response or "", settings) for row in rows]
    for row, answer in zip(rows, references, strict=True):
        if answer is None:
            name = "extractor" if settings.extractor else "answer_pattern"
            raise InputError(
                f"{row.source}: response must match {name} {getattr(settings, name)!r}, got "
                f"{row.response!r}; correct the {name} or the row"
            )
    encoded = encode_prompts(rows, tokenizer, template=card.template, max_length=card.max_length)
    texts = list(
        generate_batches(
            model,
            tokenizer,
            [example["input_ids"] for example in encoded.examples],
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            quiet=settings.quiet,
        )
    )
    predictions = [_answer(text, settings) for text in texts]
    correct = [
        answers_equal(settings.extractor, p, r)
        for p, r in zip(predictions, references, strict=True)
    ]
    return Scores(
        correct=correct,
        predictions=predictions,
        references=references,
        texts=texts,
        # Where there is no right answer but a reference, its likelihood says more than the text.
        losses=_response_losses(model, tokenizer, rows, card, settings)
        if settings.metric == "overlap"
        else [],
        num_cut_prompts=encoded.num_cut_prompts,
    )


def _response_losses(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    card: TrainingCard,
    settings: ScoringSettings,
) -> list[float]:
    """Mean negative log-likelihood per token of each row's own response, EOS included."""
    encoded = encode_rows(rows, tokenizer, template=card.template, max_length=card.max_length)
    examples = encoded.examples
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index]["input_ids"]))
    collate, losses = Collator(tokenizer, padding_side="left"), [0.0] * len(examples)
    starts = range(0, len(order), settings.batch_size)
    for start in progress(starts, "scoring", quiet=settings.quiet):
        indices = order[start : start + settings.batch_size]
        batch = collate([examples[index] for index in indices])
        sums, counts = response_log_likelihood(model, batch)
        for index, total, count in zip(indices, sums.tolist(), counts, strict=True):
            losses[index] = -total / count
    return losses


def _answer(text: str, settings: ScoringSettings) -> str | None:
    if settings.extractor is not None:
        return find_extractor(settings.extractor)(text)
    return extract_answer(text, settings.answer_pattern)


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
